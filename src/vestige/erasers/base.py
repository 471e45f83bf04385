"""The interface of erasers, which remove spans from a live cache, and the report of an erase.

The report says how completely an erase removed a span: all erasers but ``recompute`` keep later pairs that the model
computed while it still saw the span.
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
    """The treatment of a span's slots by an eraser."""

    DROPPED = "dropped"
    REPLACED = "replaced"
    LEFT = "left"


@dataclass(frozen=True, kw_only=True)
class EraseRequest:
    """The input of an eraser.

    Args:
        model: An attached model.
        cache: The cache that has read the spans; the eraser edits it in place, or not at all on an error.
        spans: Spans to erase: ascending, disjoint, seen by every batch row.
    """

    model: PreTrainedModel
    cache: KVCache
    spans: tuple[Span, ...]

    @property
    def memory(self) -> ForgetResult:
        """``EXACT`` if the cache's memory is free of all spans, else the first other result."""
        results = [self.cache.forget(span) for span in self.spans]
        return next((result for result in results if result is not ForgetResult.EXACT), ForgetResult.EXACT)


@dataclass(frozen=True, kw_only=True)
class EditResult:
    """The result of an eraser, in addition to the outcome of the slots.

    Args:
        recomputed: Tokens per batch row that the eraser ran through the model, those of the spans included.
        suffix_recomputed: Number of these that follow the first span and stay in the sequence.
        added: Tokens appended to the sequence.
        memory: Whether the cache's memory is free of the spans.
    """

    recomputed: int = 0
    suffix_recomputed: int = 0
    added: int = 0
    memory: ForgetResult = ForgetResult.EXACT


@dataclass(frozen=True, kw_only=True)
class Eraser(ABC):
    """A method to erase spans from a cache. Frozen: its edit depends on its options and the request alone."""

    fate: ClassVar[SlotOutcome]
    """The outcome of a span's slots."""
    renumbers: ClassVar[bool] = False
    """Whether the ids leave the sequence and later positions are renumbered; else positions stay."""
    replays: ClassVar[bool] = False
    """Whether the ids are read again into a new cache, which also works with pads, sliding and linear layers."""

    @abstractmethod
    def edit(self, scene: EraseRequest) -> EditResult:
        """Edit the request's cache in place; an error leaves it unchanged.

        Raises:
            VestigeError: The eraser cannot edit this cache; the message names an alternative.
        """


@dataclass(frozen=True, kw_only=True)
class SpanReport:
    """The outcome of one span's slots, as numbers of pairs over layers, batch rows and KV heads.

    Args:
        span: The span as requested.
        dropped: Pairs freed.
        replaced: Pairs replaced by the eraser's.
        left: Pairs left unchanged, still contaminated.
    """

    span: Span
    dropped: int = 0
    replaced: int = 0
    left: int = 0


@dataclass(frozen=True, kw_only=True)
class EraseReport:
    """Effect and cost of an erase.

    Args:
        method: Name of the eraser.
        exact: Whether the cache equals one that read only the remaining ids, under the same policy and budget.
        spans: One report for each span.
        suffix_left: Tokens after the first span whose pairs are unchanged, computed while the span was seen.
        tokens_recomputed: Tokens per batch row that the eraser ran through the model.
        memory: Whether the cache's memory is free of the spans.
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
        input_ids: Ids to continue from: the given ids, without the removed ones, with the appended ones.
        report: Effect and cost of the erase.
        remap: Map from old to new positions: ``remap(span)`` is the new span, or None if nothing of it is left.
    """

    input_ids: Int[Tensor, "batch _length"]
    report: EraseReport
    remap: PositionMap
