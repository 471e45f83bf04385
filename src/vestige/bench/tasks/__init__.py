"""The benchmark's tasks, one file each, named in one dict.

A task is a function from a :class:`TaskSpec` to samples. A name may choose a part of it: ``ruler`` is all thirteen
tasks, ``ruler/niah_single_1`` is one of them.
"""

import importlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vestige.bench.sample import Sample, Turn
from vestige.errors import InputError, unknown_name_message

TASKS: dict[str, str] = {
    "cases": "vestige.bench.tasks.cases:samples",
    "dialogue": "vestige.bench.tasks.dialogue:samples",
    "longbench": "vestige.bench.tasks.longbench.samples:samples",
    "longbench-e": "vestige.bench.tasks.longbench.samples:samples_e",
    "longbench-v2": "vestige.bench.tasks.longbench.samples:samples_v2",
    "niah": "vestige.bench.tasks.ruler.niah:samples",
    "ruler": "vestige.bench.tasks.ruler.suite:samples",
}
Split = Literal["dev", "test"]
SPLITS: tuple[Split, ...] = ("dev", "test")
SAMPLES = 20
"""Samples of each (task, length) of a generated task by default."""


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """The samples that are wanted of a task.

    Equal specifications give equal samples; those of different splits share no seed, key or essay.
    """

    count: Callable[[str], int]
    """Tokens of a piece of text, by the model's own tokenizer."""
    measure: Callable[[Sequence[Turn]], int]
    """Tokens of a whole conversation: chat text, contexts, questions, answer prefixes and the longest replies."""
    part: str | None = None
    """The part of the task that the name chooses; None is all of it."""
    length: int | None = None
    """Tokens that no sample may exceed, by ``measure``; None where the task's texts set it."""
    samples: int | None = None
    """Samples per (task, length); None leaves the number to the task."""
    split: Split = "dev"
    seed: int = 0
    answer_room: int | None = None
    """Replies end this many tokens beyond the longest answer; None leaves the task's own limit."""
    essays: Path | None = None
    """A folder of text files for haystacks; None fetches the essays online."""
    qa: Path | None = None
    """A file of questions and paragraphs in SQuAD's or HotpotQA's format; None fetches both online."""
    file: Path | None = None
    """The user's own samples: a cases file, or LongBench data (a JSONL file, or a folder of them)."""
    prompts: Path | None = None
    """A JSON file of prompts in place of the task's own."""

    @property
    def num_samples(self) -> int:
        """Samples per (task, length) of a generated task."""
        return SAMPLES if self.samples is None else self.samples

    def choose_parts(self, what: str, known: Collection[str]) -> tuple[str, ...]:
        """Return the part wanted, or all parts of a task; raise an InputError if the part is unknown."""
        if self.part is not None and self.part not in known:
            raise InputError(unknown_name_message(what, self.part, known))
        return tuple(known) if self.part is None else (self.part,)

    def reply_limit(self, answers: Iterable[str], own: int, *, every: bool = False) -> int:
        """Return the longest reply of a turn, in tokens.

        Args:
            answers: The right answers.
            own: The task's own limit.
            every: Whether one reply must have all answers, not the best of them.
        """
        if self.answer_room is None:
            return own
        wanted = [", ".join(answers)] if every else list(answers)
        return max((self.count(f" {answer}") for answer in wanted), default=0) + self.answer_room


def make(name: str, spec: TaskSpec) -> list[Sample]:
    """Return the samples of a task, ordered by (task, index); a name can have the part of the task: ``ruler/vt``.

    Raises:
        InputError: No such task or part, or the data it needs is missing or malformed.
    """
    head, _, part = name.partition("/")
    check(name)
    module, _, function = TASKS[head].partition(":")
    samples: list[Sample] = getattr(importlib.import_module(module), function)(replace(spec, part=part or None))
    return samples


def check(name: str) -> None:
    """Raise an InputError that lists the tasks if none has this name."""
    if name.partition("/")[0] not in TASKS:
        raise InputError(unknown_name_message("task", name, TASKS))
