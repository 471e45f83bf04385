"""Samples of the benchmarks: conversations of one turn or several, with the metric of every reply."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A context to read, a question about it, and the right answers.

    The context is read, and evicted, before the question is read, unless the run is question-aware.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    answer_prefix: str = ""
    """Opens the reply; not part of what is scored."""
    metric: str = "contains"
    """A key of :data:`vestige.bench.metrics.scores.METRICS`."""
    max_new_tokens: int = 64
    choices: tuple[str, ...] = ()
    """All classes, for classification metrics."""


@dataclass(frozen=True, kw_only=True)
class BaseSample:
    """The place of a sample in the results, whatever the benchmark."""

    task: str
    """The name of its row, such as ``ruler/niah_single_1``."""
    index: int
    """Unique within (task, length)."""
    length: int
    """The nominal length of its row in tokens: chat text, contexts, questions and replies together are never longer."""
    tags: Mapping[str, str | int | float] = field(default_factory=dict)
    """Groups that results are broken down by: ``depth``, ``prompts``, ..."""


@dataclass(frozen=True)
class BaseItem(ABC):
    """A sample as token ids, whatever the benchmark."""

    sample: BaseSample

    @property
    @abstractmethod
    def digest(self) -> str:
        """A hash of the ids and the answers: a record with the same one was made from the same data."""


@dataclass(frozen=True, kw_only=True)
class Sample(BaseSample):
    """One conversation over one cache. Its score is the mean over its turns."""

    turns: tuple[Turn, ...]
