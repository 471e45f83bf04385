"""The config of the benchmark of erasers, checked before anything is loaded."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vestige import erasers, policies
from vestige.bench.config import RunConfig
from vestige.bench.erasing import tasks
from vestige.bench.methods.method import Method
from vestige.budget import Budget
from vestige.errors import InputError, PolicyError
from vestige.policies.base import Policy

BOUNDS = ("noop", "recompute")
"""The two erasers that every method is compared with: one does nothing, one reads everything after the span again."""
FAR = ("derived_1500", 2048)
"""A task that "all tasks" leaves out at lengths below this: its consequence stands 1,500 tokens after its fact."""


def add_bounds(methods: Iterable[str]) -> tuple[str, ...]:
    """Return the bounds, then the other erasers, each once; raise an InputError if one is unknown."""
    names = tuple(dict.fromkeys([*BOUNDS, *methods]))
    for name in names:
        erasers.make(name)
    return names


@dataclass(frozen=True, kw_only=True)
class EraseBenchConfig(RunConfig):
    """The config of the benchmark of erasers. No task stands for all tasks that a length and the files allow.

    Raises:
        InputError: An unknown task, method or split, a task without its file, a file that is missing, or a number out
            of range.
        PolicyError: An unknown policy, or a budget missing or refused.
        BudgetError: A budget that cannot be read.
    """

    methods: tuple[str, ...] = ()
    """Erasers, with options if wanted: ``repair(share=0.3)``. The bounds are run whatever is named."""
    policy: str = "full"
    """The policy that evicts before the erase, before any question."""
    budget: str | None = None
    """Pairs that stay, as the command line takes it; None for ``full``."""
    kept_only: bool = False
    """Run methods other than ``noop`` only on samples that pass the filter, and ``noop`` only where clean replies are
    right."""

    def __post_init__(self) -> None:
        if not self.lengths or any(n < 1 for n in self.lengths):
            raise InputError(f"--length must be positive whole numbers, such as 2048, got {self.lengths}")
        for name in self.tasks:
            tasks.check(name)
            if name in tasks.QA_TASKS and self.qa is None:
                raise InputError(f"{name} needs --qa FILE, questions in SQuAD's format")
        self.check_texts()
        add_bounds(self.methods)
        if self.policy == "full" and self.budget is not None:
            raise PolicyError(f"policy 'full' keeps everything, so it takes no budget, got {self.budget}")
        self.make_policy()

    def make_policy(self) -> Policy:
        """Return the policy that evicts before the erase."""
        return policies.make(self.policy, None if self.budget is None else Budget.parse(self.budget), seed=self.seed)

    def make_methods(self) -> tuple[Method, ...]:
        """Return a method for each eraser, the bounds first."""
        share, budget = self.make_policy().share, self.budget or "1.0"
        return tuple(
            Method(policy=self.policy, share=share, budget=budget, eraser=name) for name in add_bounds(self.methods)
        )

    def tasks_at(self, length: int) -> tuple[str, ...]:
        """Return the tasks of a length: the named ones, or all that the length and the files allow."""
        if self.tasks:
            return tuple(dict.fromkeys(self.tasks))
        left_out = {*(tasks.QA_TASKS if self.qa is None else ()), *([FAR[0]] if length < FAR[1] else ())}
        return tuple(name for name in tasks.TASKS if name not in left_out)

    def fixed_settings(self) -> dict[str, Any]:
        """Return the settings that a resumed run may not change; anything else may be added."""
        return {"benchmark": "erase"} | super().fixed_settings()
