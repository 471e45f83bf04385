"""Half-open ranges of positions of the original sequence, and how positions change when ranges leave it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vestige.errors import InputError


@dataclass(frozen=True, order=True)
class Span:
    """Positions ``[start, end)``, counted in tokens as seen, pads left out.

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
        """Return what two spans share, or None."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Span(start, end) if start < end else None


def within(positions: Int[Tensor, "*shape"], spans: Sequence[Span]) -> Bool[Tensor, "*shape"]:
    """Return which positions lie in any of the spans; pads (-1) lie in none."""
    found = torch.zeros_like(positions, dtype=torch.bool)
    for span in spans:
        found |= (positions >= span.start) & (positions < span.end)
    return found


@dataclass(frozen=True)
class PositionMap:
    """Spans leave a sequence and what follows moves up: positions before become positions after.

    Args:
        spans: What leaves, ascending and disjoint.
    """

    spans: tuple[Span, ...] = ()

    @property
    def removed(self) -> int:
        """Tokens that leave."""
        return sum(map(len, self.spans))

    def at(self, position: int) -> int:
        """Return where a position goes; one that leaves goes where what follows it goes."""
        return position - sum(min(max(position - span.start, 0), len(span)) for span in self.spans)

    def moved(self, positions: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return where positions go; pads (-1) stay pads."""
        shift = torch.zeros_like(positions)
        for span in self.spans:
            shift += (positions - span.start).clamp(0, len(span))
        return positions - shift

    def __call__(self, span: Span) -> Span | None:
        """Return where what is left of a span goes, or None if nothing is left of it."""
        start, end = self.at(span.start), self.at(span.end)
        return Span(start, end) if start < end else None

    def over(self, spans: Sequence[Span]) -> tuple[Span, ...]:
        """Return where what is left of several spans goes."""
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
