"""Configs of benchmark runs, checked before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vestige.bench import tasks
from vestige.bench.methods.method import Method
from vestige.bench.tasks import SPLITS, TaskSpec
from vestige.bench.tokenization import Renderer
from vestige.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options that every benchmark of methods has: samples, their texts, and their split."""

    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    """Tokens of a sample: chat text, context, question and reply."""
    samples: int | None = None
    """Samples of each (task, length); None leaves the number to the task."""
    split: str = "dev"
    seed: int = 0
    essays: Path | None = None
    """A folder of text files for haystacks; None fetches the essays online."""
    qa: Path | None = None
    """Questions in SQuAD's or HotpotQA's format."""
    fixed: ClassVar[tuple[str, ...]] = ("split", "seed")
    """Options that a resumed run may not change."""

    def check_texts(self) -> None:
        """Raise an InputError for an unknown split, a number of samples below 1, or a file that is missing."""
        if self.split not in SPLITS:
            raise InputError(f"--split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        require_positive("samples", self.samples)
        for path in (self.essays, self.qa):
            require_path(path)

    def task_spec(self, renderer: Renderer, length: int | None, **options: Any) -> TaskSpec:
        """Return the specification that a task makes its samples from; ``options`` are further fields of it."""
        return TaskSpec(
            count=renderer.count,
            measure=renderer.measure,
            length=length,
            samples=self.samples,
            split="dev" if self.split == "dev" else "test",
            seed=self.seed,
            essays=self.essays,
            qa=self.qa,
            **options,
        )

    def fixed_settings(self) -> dict[str, Any]:
        """Return the settings that a resumed run may not change."""
        return {name: getattr(self, name) for name in self.fixed}


@dataclass(frozen=True, kw_only=True)
class BenchConfig(RunConfig):
    """The config of a benchmark of policies, memories and peers. No length leaves the length to the task.

    Raises:
        InputError: An unknown task or split, a file that is missing, or a number out of range.
    """

    methods: tuple[Method, ...]
    question_aware: bool = False
    """Whether the model reads the question before the cache is compressed."""
    chunk: int | None = None
    """Tokens per forward while reading; None reads in one piece."""
    batch: int = 1
    """Samples that vestige's own methods read and answer together, where their lengths allow."""
    answer_room: int | None = None
    cases: Path | None = None
    longbench: Path | None = None
    prompts: Path | None = None
    fixed: ClassVar[tuple[str, ...]] = ("split", "question_aware", "chunk", "batch", "answer_room", "seed")

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError(f"name at least one task: {', '.join(tasks.TASKS)}")
        for name in self.tasks:
            tasks.check(name)
        if any(n < 1 for n in self.lengths):
            raise InputError(f"--length must be positive whole numbers, got {self.lengths}")
        self.check_texts()
        for path in (self.cases, self.longbench, self.prompts):
            require_path(path)
        for name in ("chunk", "batch", "answer_room"):
            require_positive(name, getattr(self, name))


def require_positive(name: str, value: int | None) -> None:
    """Raise an InputError if an option is given and is below 1."""
    if value is not None and value < 1:
        raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def require_path(path: Path | None) -> None:
    """Raise an InputError if a path is given and nothing is there."""
    try:
        found = path is None or path.exists()
    except OSError:
        found = False
    if not found:
        raise InputError(f"no such file or folder: {path}")
