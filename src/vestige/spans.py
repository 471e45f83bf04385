"""Spans: half-open ranges of positions in the original sequence, and the map of positions when spans leave it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vestige.errors import InputError


@dataclass(frozen=True, order=True)
class Span:
    """Positions ``[start, end)``, counted in tokens as seen, without pads.

    Raises:
        InputError: The range is empty or begins before 0.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise InputError(f"a span needs 0 <= start < end, got [{self.start}, {self.end})")

    def __len__(self) -> int:
        return self.end - self.start

    def common(self, other: "Span") -> "Span | None":
        """Return the overlap of two spans, or None."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Span(start, end) if start < end else None


def within(positions: Int[Tensor, "*shape"], spans: Sequence[Span]) -> Bool[Tensor, "*shape"]:
    """Return a mask of the positions that lie in any of the spans; pads (-1) lie in none."""
    found = torch.zeros_like(positions, dtype=torch.bool)
    for span in spans:
        found |= (positions >= span.start) & (positions < span.end)
    return found


@dataclass(frozen=True)
class PositionMap:
    """A map from old to new positions when spans leave a sequence and later tokens move up.

    Args:
        spans: The spans that leave, ascending and disjoint.
    """

    spans: tuple[Span, ...] = ()

    @property
    def removed(self) -> int:
        """Number of tokens that leave."""
        return sum(map(len, self.spans))

    def at(self, position: int) -> int:
        """Return the new position; a position that leaves gets that of the next token that stays."""
        return position - sum(min(max(position - span.start, 0), len(span)) for span in self.spans)

    def moved(self, positions: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return the new positions; pads (-1) stay pads."""
        shift = torch.zeros_like(positions)
        for span in self.spans:
            shift += (positions - span.start).clamp(0, len(span))
        return positions - shift

    def __call__(self, span: Span) -> Span | None:
        """Return the new span of the tokens of a span that stay, or None if none stay."""
        start, end = self.at(span.start), self.at(span.end)
        return Span(start, end) if start < end else None

    def over(self, spans: Sequence[Span]) -> tuple[Span, ...]:
        """Return the new spans of several spans, without those that leave entirely."""
        return tuple(moved for span in spans if (moved := self(span)) is not None)


def merge_spans(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Return spans in order; those that touch or overlap become one."""
    merged: list[Span] = []
    for span in sorted(spans):
        if merged and span.start <= merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return tuple(merged)
