"""The greedy loop that vestige's methods and peers share: plain forwards, timed, for one conversation or a batch.

Without ``generate`` a step can be timed, rows of a batch can stop at different places, and every method does the same
work.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from vestige.utils.timing import synchronized_time


@dataclass(frozen=True)
class Decoded:
    """Greedy replies and their time."""

    replies: tuple[tuple[int, ...], ...]
    """Ids of each batch row, the id that ended it included; all but the last one were fed."""
    seconds: float
    steps: int
    """Forwards of one token a row: those of the longest reply."""


def decode(
    feed: Callable[[Int[Tensor, "batch 1"]], Float[Tensor, "batch vocab"]],
    logits: Float[Tensor, "batch vocab"],
    limits: Sequence[int],
    stop: Collection[int],
) -> Decoded:
    """Decode until every batch row has stopped; a finished row is still fed, and its further tokens are dropped.

    Args:
        feed: Feeds one token a row and returns the logits after it.
        logits: Logits after the last token of each question.
        limits: Longest reply of each row, in tokens; at least 1.
        stop: Ids that end a reply.
    """
    replies: list[list[int]] = [[] for _ in limits]
    started, steps = synchronized_time(logits.device), 0
    while True:
        token = logits.argmax(-1, keepdim=True)
        for reply, limit, new in zip(replies, limits, token[:, 0].tolist(), strict=True):
            if not _has_ended(reply, limit, stop):
                reply.append(new)
        if all(_has_ended(reply, limit, stop) for reply, limit in zip(replies, limits, strict=True)):
            return Decoded(tuple(map(tuple, replies)), synchronized_time(logits.device) - started, steps)
        logits = feed(token)
        steps += 1


def _has_ended(reply: list[int], limit: int, stop: Collection[int]) -> bool:
    return len(reply) >= limit or (bool(reply) and reply[-1] in stop)
