"""Messages of a conversation: their text, their tokens in the cache, and their erased parts."""

from dataclasses import dataclass, replace
from typing import Any

from vestige.spans import PositionMap, Span


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message, and its tokens in the cache.

    Args:
        role: "user" or "assistant".
        text: Original text, which erasing does not change.
        span: Its tokens in the cache; None once these left the sequence.
        offsets: Characters of the text that each of its tokens stands for, without tokens that left the sequence.
        erased: Erased parts of the text, as characters.
    """

    role: str
    text: str
    span: Span | None
    offsets: tuple[tuple[int, int], ...]
    erased: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, saved: dict[str, Any]) -> "Message":
        """Return a message from its JSON object."""
        offsets, erased = (tuple((int(a), int(b)) for a, b in saved[name]) for name in ("offsets", "erased"))
        span = Span(**saved["span"]) if saved["span"] else None
        return cls(role=saved["role"], text=saved["text"], span=span, offsets=offsets, erased=erased)

    def without(self, span: Span, moved: PositionMap | None) -> "Message":
        """Return the message after a span was erased, with its new span and its erased characters.

        Args:
            span: Erased positions.
            moved: New positions of the others; None if they did not change.
        """
        if self.span is None:
            return self
        start, end = max(span.start, self.span.start), min(span.end, self.span.end)
        tokens = range(start - self.span.start, end - self.span.start) if start < end else range(0)
        erased = self.erased
        if len(tokens) and len(self.offsets) >= tokens.stop:
            erased = tuple(sorted((*erased, (self.offsets[tokens.start][0], self.offsets[tokens.stop - 1][1]))))
        if moved is None:
            return replace(self, erased=erased)
        offsets = tuple(pair for i, pair in enumerate(self.offsets) if i not in tokens)
        return replace(self, span=moved(self.span), offsets=offsets, erased=erased)
