"""What a run of the benchmark of erasers measures, checked before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vestige import erasers, policies
from vestige.bench.config import require_path
from vestige.bench.erasing import tasks
from vestige.bench.tasks import SPLITS, Order
from vestige.bench.tokenization import Renderer
from vestige.budget import Budget
from vestige.errors import InputError, PolicyError
from vestige.policies.base import Policy

BOUNDS = ("noop", "recompute")
"""What every method is compared with: nothing done, and everything behind the span read anew."""
FAR = ("derived_1500", 2048)
"""A task that is left out of "all tasks" at lengths below this: its consequence stands 1,500 tokens behind its fact."""


@dataclass(frozen=True, kw_only=True)
class EraseBenchConfig:
    """What to measure.

    Raises:
        InputError: An unknown task, method or split, a task without its file, a file that is missing, or a number out
            of range.
        PolicyError: An unknown policy, or a budget missing or refused.
        BudgetError: A budget that cannot be read.
    """

    lengths: tuple[int, ...]
    """Tokens of a sample: chat text, context, question and reply."""
    tasks: tuple[str, ...] = ()
    """Keys of ``TASKS``; none names all that a length and the files allow."""
    methods: tuple[str, ...] = ()
    """Erasers, with options if wanted: ``repair(share=0.3)``. The bounds are run whatever is named."""
    policy: str = "full"
    """What is evicted before the erase, when nothing was asked yet."""
    budget: str | None = None
    """Pairs that stay, as the command line takes it; None for ``full``."""
    samples: int | None = None
    """Of each (task, length); None is 20."""
    kept_only: bool = False
    """Run methods other than ``noop`` only on samples that pass the filter, and ``noop`` only where clean replies are
    right."""
    split: str = "dev"
    seed: int = 0
    essays: Path | None = None
    """A folder of text files for haystacks; None fetches them online."""
    qa: Path | None = None
    """Questions in SQuAD's format."""

    def __post_init__(self) -> None:
        if not self.lengths or any(n < 1 for n in self.lengths):
            raise InputError(f"--length must be positive whole numbers, such as 2048, got {self.lengths}")
        for name in self.tasks:
            tasks.check(name)
            if name in tasks.QA_TASKS and self.qa is None:
                raise InputError(f"{name} needs --qa FILE, questions in SQuAD's format")
        if self.split not in SPLITS:
            raise InputError(f"--split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if self.samples is not None and self.samples < 1:
            raise InputError(f"--samples must be at least 1, got {self.samples}")
        for path in (self.essays, self.qa):
            require_path(path)
        for method in self.all_methods:
            erasers.make(method)
        if self.policy == "full" and self.budget is not None:
            raise PolicyError(f"policy 'full' keeps everything, so it takes no budget, got {self.budget}")
        self.make_policy()

    @property
    def all_methods(self) -> tuple[str, ...]:
        """The bounds, then the other methods, each once."""
        return tuple(dict.fromkeys([*BOUNDS, *self.methods]))

    def make_policy(self) -> Policy:
        """Return what evicts before the erase."""
        return policies.make(self.policy, None if self.budget is None else Budget.parse(self.budget), seed=self.seed)

    def tasks_at(self, length: int) -> tuple[str, ...]:
        """Return the tasks of a length: those that were named, or all that it and the files allow."""
        if self.tasks:
            return tuple(dict.fromkeys(self.tasks))
        left_out = {*(tasks.QA_TASKS if self.qa is None else ()), *([FAR[0]] if length < FAR[1] else ())}
        return tuple(name for name in tasks.TASKS if name not in left_out)

    def order(self, renderer: Renderer, length: int) -> Order:
        """Return what tasks are asked for."""
        return Order(
            count=renderer.count,
            measure=renderer.measure,
            length=length,
            samples=self.samples,
            split="dev" if self.split == "dev" else "test",
            seed=self.seed,
            essays=self.essays,
            qa=self.qa,
        )

    def arm(self, method: str) -> dict[str, str | None]:
        """Return what tells a record from others of its sample, by the names that the store knows.

        ``peer`` is who did the work: here the eraser.
        """
        share = self.make_policy().share
        return {"policy": self.policy, "share": share, "memory": "none", "budget": self.budget or "1.0", "peer": method}

    def books(self) -> dict[str, Any]:
        """Return what must not change when a run goes on; methods, tasks, samples and policies may be added."""
        return {"benchmark": "erase", "split": self.split, "seed": self.seed}
