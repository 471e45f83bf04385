"""Drafts of samples: a text with passages to erase and queries about it, before a model has read it."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One piece of a text.

    Args:
        text: The piece.
        is_erased: Whether the sample erases it.
        states: The value it gives to the main query, or "" if it gives none.
    """

    text: str
    is_erased: bool = False
    states: str = ""


@dataclass(frozen=True, kw_only=True)
class Query:
    """A query about a text.

    Args:
        kind: Name of what it trains, for the metrics.
        question: Follows the text.
        prefix: Opens the reply; "" lets the model open it.
        answer: Part of a right reply to the clean text; "" accepts any reply.
        misled: Whether the query trains only if the erased passages change the reply.
        verbatim: Whether the reply is a quotation, which must begin with the answer's first words.
    """

    kind: str
    question: str
    prefix: str
    answer: str = ""
    misled: bool = False
    verbatim: bool = False


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A text and its queries.

    Args:
        passages: The text, piece by piece.
        queries: The first query decides whether the text is worth training on.
        joint: Separator between passages.
    """

    passages: tuple[Passage, ...]
    queries: tuple[Query, ...]
    joint: str = " "

    @property
    def text(self) -> str:
        """The whole text."""
        return self.joint.join(passage.text for passage in self.passages)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Character ranges of the erased passages; adjacent passages make one range."""
        found: list[tuple[int, int]] = []
        start = 0
        for passage in self.passages:
            end = start + len(passage.text)
            if passage.is_erased and found and found[-1][1] == start - len(self.joint):
                found[-1] = (found[-1][0], end)
            elif passage.is_erased:
                found.append((start, end))
            start = end + len(self.joint)
        return found

    def flipped(self) -> "Draft | None":
        """Return the draft that erases the kept statement instead of the erased one; None unless there is one of each.

        Whichever statement the model believes, one of the two drafts trains it.
        """
        stating = [passage for passage in self.passages if passage.states]
        erased = [passage.states for passage in stating if passage.is_erased]
        if len(erased) != 1 or len(stating) != 2:
            return None
        passages = tuple(
            replace(piece, is_erased=not piece.is_erased) if piece.states else piece for piece in self.passages
        )
        queries = (replace(self.queries[0], answer=erased[0]), *self.queries[1:])
        return replace(self, passages=passages, queries=queries)
