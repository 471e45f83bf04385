"""Taking spans out of a cache that is alive: the interface of every eraser, and the report of an erase.

What was erased is gone from every later answer only as far as the report says: all but ``recompute`` leave pairs behind
the span that were made while the model still saw it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from vestige.cache.kv_cache import KVCache
from vestige.memory.base import ForgetResult
from vestige.spans import PositionMap, Span


class SlotOutcome(Enum):
    """What an eraser makes of the slots of a span."""

    DROPPED = "dropped"
    REPLACED = "replaced"
    LEFT = "left"


@dataclass(frozen=True, kw_only=True)
class EraseRequest:
    """What an eraser is given.

    Args:
        model: An attached model.
        cache: Has read the spans; to be edited in place, or left as it was on any error.
        spans: What must go: ascending, disjoint, seen by every batch row.
    """

    model: PreTrainedModel
    cache: KVCache
    spans: tuple[Span, ...]

    @property
    def memory(self) -> ForgetResult:
        """How far the cache's memory is free of the spans."""
        found = [self.cache.forget(span) for span in self.spans]
        return next((one for one in found if one is not ForgetResult.EXACT), ForgetResult.EXACT)


@dataclass(frozen=True, kw_only=True)
class EditResult:
    """What an eraser did, beyond the fate of the slots.

    Args:
        recomputed: Tokens of a batch row that were run through the model, those of the spans included.
        suffix_recomputed: How many of these stand behind the first span and stay.
        added: Tokens that were added behind everything.
        memory: How far the cache's memory is free of the spans.
    """

    recomputed: int = 0
    suffix_recomputed: int = 0
    added: int = 0
    memory: ForgetResult = ForgetResult.EXACT


@dataclass(frozen=True, kw_only=True)
class Eraser(ABC):
    """A way to take spans out of a cache. Frozen: what it does depends on its options and the scene alone."""

    fate: ClassVar[SlotOutcome]
    """What becomes of the slots of a span."""
    renumbers: ClassVar[bool] = False
    """Whether the ids leave the sequence and what follows is renumbered; else positions stay."""
    replays: ClassVar[bool] = False
    """Whether the cache is read anew from its ids, which also serves sliding and linear layers, and pads."""

    @abstractmethod
    def edit(self, scene: EraseRequest) -> EditResult:
        """Edit the scene's cache in place; on any error it is as it was.

        Raises:
            VestigeError: This cannot be done to this cache; the message says what can.
        """


@dataclass(frozen=True, kw_only=True)
class SpanReport:
    """What became of one span's slots: pairs over layers, batch rows and KV heads.

    Args:
        span: As it was given.
        dropped: Freed.
        replaced: Hold what the eraser made.
        left: As they were, contaminated.
    """

    span: Span
    dropped: int = 0
    replaced: int = 0
    left: int = 0


@dataclass(frozen=True, kw_only=True)
class EraseReport:
    """What an erase did and what it cost.

    Args:
        method: Name of the eraser.
        exact: The cache equals one that read the remaining ids afresh, under the same policy and budget.
        spans: One report for each span.
        suffix_left: Tokens behind the first span whose pairs are as they were, made while the span was seen.
        tokens_recomputed: Tokens of a batch row that were run through the model.
        memory: How far the cache's memory is free of the spans.
        edit_s: Seconds of the edit.
    """

    method: str
    exact: bool
    spans: tuple[SpanReport, ...]
    suffix_left: int
    tokens_recomputed: int
    memory: ForgetResult
    edit_s: float

    @property
    def slots_dropped(self) -> int:
        """Pairs freed, over all spans."""
        return sum(span.dropped for span in self.spans)

    @property
    def slots_replaced(self) -> int:
        """Pairs replaced, over all spans."""
        return sum(span.replaced for span in self.spans)

    @property
    def slots_left(self) -> int:
        """Pairs left, over all spans."""
        return sum(span.left for span in self.spans)


@dataclass(frozen=True, kw_only=True)
class Erased:
    """The sequence after an erase.

    Args:
        input_ids: What to go on from: the ids given, without what was taken out, with what was added.
        report: What was done.
        remap: Where positions went: ``remap(span)`` is a later span's place now, None if nothing of it is left.
    """

    input_ids: Int[Tensor, "batch _length"]
    report: EraseReport
    remap: PositionMap
