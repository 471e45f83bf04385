"""What a benchmark run measures, checked before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vestige.bench import tasks
from vestige.bench.methods.method import Arm
from vestige.errors import InputError


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure.

    Raises:
        InputError: An unknown task or split, a file that is missing, or a number out of range.
    """

    tasks: tuple[str, ...]
    arms: tuple[Arm, ...]
    lengths: tuple[int, ...] = ()
    """Tokens of a sample: chat text, context, question and reply; empty leaves it to the task."""
    samples: int | None = None
    split: str = "dev"
    question_aware: bool = False
    """Whether the question is read before the context is compressed."""
    chunk: int | None = None
    """Tokens per forward while reading; None reads in one piece."""
    batch: int = 1
    """Samples that our own arms read and answer together, where their lengths allow."""
    answer_room: int | None = None
    seed: int = 0
    essays: Path | None = None
    qa: Path | None = None
    cases: Path | None = None
    longbench: Path | None = None
    prompts: Path | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError(f"name at least one task: {', '.join(tasks.TASKS)}")
        for name in self.tasks:
            tasks.check(name)
        if self.split not in tasks.SPLITS:
            raise InputError(f"--split must be one of {', '.join(tasks.SPLITS)}, got {self.split!r}")
        if any(n < 1 for n in self.lengths):
            raise InputError(f"--length must be positive whole numbers, got {self.lengths}")
        for path in (self.essays, self.qa, self.cases, self.longbench, self.prompts):
            require_path(path)
        for name, least in (("samples", 1), ("chunk", 1), ("batch", 1), ("answer_room", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")

    def books(self) -> dict[str, Any]:
        """Return what must not change when a run goes on."""
        names = ("split", "question_aware", "chunk", "batch", "answer_room", "seed")
        return {name: getattr(self, name) for name in names}


def require_path(path: Path | None) -> None:
    """Raise an InputError if a path is given and nothing is there."""
    try:
        found = path is None or path.exists()
    except OSError:
        found = False
    if not found:
        raise InputError(f"no such file or folder: {path}")
