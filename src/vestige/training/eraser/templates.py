"""A text with passages to erase and what is asked about it, before any model has seen it."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One piece of a text.

    Args:
        text: The piece.
        gone: Whether it is what is erased.
        states: What it says of what is asked first, if anything.
    """

    text: str
    is_erased: bool = False
    states: str = ""


@dataclass(frozen=True, kw_only=True)
class Query:
    """Something that is asked about a text.

    Args:
        kind: What it trains, for the metrics.
        question: Stands behind the text.
        prefix: Opens the reply; empty leaves that to the model.
        answer: What a right reply to the clean text has; empty takes whatever the model says.
        misled: Whether the erased passages must change the reply, or it teaches nothing.
        verbatim: Whether the reply is a quotation: it must begin with the answer's first words.
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
        passages: The text, piece by piece; those that are gone are erased.
        queries: The first one decides whether the text is worth training on; the others are taken along.
        joint: Stands between passages.
    """

    passages: tuple[Passage, ...]
    queries: tuple[Query, ...]
    joint: str = " "

    @property
    def text(self) -> str:
        """The whole text."""
        return self.joint.join(one.text for one in self.passages)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The characters of the erased passages; those that follow each other are one."""
        found: list[tuple[int, int]] = []
        at = 0
        for one in self.passages:
            end = at + len(one.text)
            if one.is_erased and found and found[-1][1] == at - len(self.joint):
                found[-1] = (found[-1][0], end)
            elif one.is_erased:
                found.append((at, end))
            at = end + len(self.joint)
        return found

    def flipped(self) -> "Draft | None":
        """Return the same text with the statement that stays and the one that goes exchanged, if there is one of each.

        Whichever of two the model believes, one of the drafts teaches it something.
        """
        kept, is_erased = (
            [one.states for one in self.passages if one.states and one.is_erased == side] for side in (False, True)
        )
        if len(kept) != 1 or len(is_erased) != 1:
            return None
        passages = tuple(replace(one, is_erased=not one.is_erased) if one.states else one for one in self.passages)
        queries = (replace(self.queries[0], answer=is_erased[0]), *self.queries[1:])
        return replace(self, passages=passages, queries=queries)
