"""Find a passage among the tokens of a text, by the offsets of its tokenisation."""

import re
from collections.abc import Sequence

from vestige.errors import InputError
from vestige.spans import Span

SHOWN = 5
"""Number of places that an error lists."""


def find(text: str, part: str, offsets: Sequence[tuple[int, int]]) -> Span:
    """Return the span of the tokens that share a character with a passage, white space excepted.

    The passage must occur once in the text; ``offsets`` are the characters of each of its tokens.

    Raises:
        InputError: The passage is empty, does not occur, occurs more than once (the places are listed), or reaches into
            tokens of the chat text.
    """
    part = part.strip()
    if not part:
        raise InputError("the passage is empty")
    places = [match.start() for match in re.finditer(re.escape(part), text)]
    if not places:
        raise InputError(f"the passage {_shorten(part)!r} does not occur in the text")
    if len(places) > 1:
        listed = ", ".join(_describe_place(text, place, offsets, part) for place in places[:SHOWN])
        more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
        raise InputError(
            f"the passage {_shorten(part)!r} occurs {len(places)} times: {listed}{more}; name more of it, or tokens"
        )
    span = tokens_at(text, places[0], places[0] + len(part), offsets)
    if offsets[span.start][0] < 0:
        raise InputError(f"the passage {_shorten(part)!r} shares a token with the chat text before it")
    return span


def tokens_at(text: str, start: int, end: int, offsets: Sequence[tuple[int, int]]) -> Span:
    """Return the span of the tokens that share a character of ``text[start:end]`` that is not white space.

    Raises:
        InputError: There are no such tokens: they were erased.
    """
    found = [i for i, (a, b) in enumerate(offsets) if text[max(a, start) : max(min(b, end), 0)].strip()]
    if not found:
        raise InputError(f"the passage {_shorten(text[start:end])!r} was taken out already")
    return Span(found[0], found[-1] + 1)


def find_numbered(first: int, last: int, offsets: Sequence[tuple[int, int]]) -> Span:
    """Return the span of tokens ``first`` to ``last`` (excluded) of a text, counted without the chat text before it.

    Raises:
        InputError: The text has fewer tokens.
    """
    begin = next((i for i, (start, _) in enumerate(offsets) if start >= 0), len(offsets))
    if not 0 <= first < last <= len(offsets) - begin:
        raise InputError(f"the text has tokens 0 to {len(offsets) - begin}, so {first}:{last} is no span of it")
    return Span(begin + first, begin + last)


def _describe_place(text: str, place: int, offsets: Sequence[tuple[int, int]], part: str) -> str:
    begin = next((i for i, (start, _) in enumerate(offsets) if start >= 0), 0)
    span = tokens_at(text, place, place + len(part), offsets)
    return f"line {text.count(chr(10), 0, place) + 1} ({span.start - begin}:{span.end - begin})"


def _shorten(part: str) -> str:
    return part if len(part) <= 40 else f"{part[:37]}..."
