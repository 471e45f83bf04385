"""The tasks of the benchmark of erasers, in one dict from a name to the maker of its samples."""

from collections.abc import Iterator
from itertools import islice

from vestige.bench.erasing import derived_facts, distractors, needles, stories
from vestige.bench.erasing.sample import EraseSample
from vestige.bench.erasing.story_templates import Maker, each
from vestige.bench.tasks import TaskSpec
from vestige.errors import InputError, unknown_name_message

TASKS: dict[str, Maker] = {
    "needles_early": each(needles.early),
    "needles_late": each(needles.late),
    "distractor_qa": distractors.samples,
    "tool_result": each(stories.tool_result),
    "injection": each(stories.injection),
    "preference": each(stories.preference),
    "derived_0": derived_facts.after(0),
    "derived_250": derived_facts.after(250),
    "derived_1500": derived_facts.after(1500),
    "several_spans": each(needles.several),
    "harmless": each(needles.harmless),
    "repeat": each(needles.repeat),
}
QA_TASKS = frozenset({"distractor_qa"})
"""Tasks that need a file of questions."""
SAMPLES = 20
"""Samples of each (task, length) by default."""


def check(name: str) -> None:
    """Raise an InputError that lists the tasks if none has this name."""
    if name not in TASKS:
        raise InputError(unknown_name_message("task", name, TASKS))


def make(name: str, spec: TaskSpec) -> Iterator[EraseSample]:
    """Yield the samples of a named task.

    Args:
        name: A key of ``TASKS``.
        spec: The samples wanted. Sample ``i`` does not depend on the number of samples; dev and test share nothing.

    Raises:
        InputError: No such task, no length or one that is too short, or the texts it needs are missing or malformed.
    """
    check(name)
    yield from islice(TASKS[name](spec, name), SAMPLES if spec.samples is None else spec.samples)
