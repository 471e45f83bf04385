"""Keep what the model looks at when it is asked to repeat the text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoTokenizer

from vestige.errors import PolicyError
from vestige.models.forward import pad_left, replay
from vestige.policies.base import NewPairs, Policy, ReplayCache
from vestige.policies.observation import Observation, RowView, attention_weights
from vestige.policies.selection import Share
from vestige.text.chat_template import ChatTemplate

REQUEST = "Repeat the previous context word for word."
"""What the model is asked to do, in the chat text that its tokenizer puts around a question."""

_UNASKED = -1.0  # in the side array; attention is never below 0
_BLOCK = 256  # queries whose attention is held at a time
_LEAST_CHUNK = 64  # shorter chunks would take more forwards than anyone wants


@dataclass(frozen=True, kw_only=True)
class KVzip(Policy):
    """Keep the pairs that the model needs to repeat the text, whatever will be asked about it: one top-k model-wide.

    After a text was read it is fed once more behind itself, in chunks, each behind a request to repeat it. A pair is
    worth the most attention that any query of its chunk's replay pays to it. The replay is not kept; it takes about as
    long as reading, and room for one chunk beside the whole text, of which nothing is evicted before its end.

    Source: KVzip, arXiv 2505.23416, and the code its authors published: as there, the softmax runs over the first
    tokens (``sink``), the chunk and the replay alone, so that the cost of scoring grows as the text, not as its square;
    the maximum is over the query group; raw scores compete. Differs: a later chunk's replay begins with the last tokens
    of the chunk before it, where the authors quote them in the request; attention is float32; the window is protected.
    KVzip+, which weighs attention by norms of values and hidden states, is left out: no hidden states are at hand.
    Completed by us: what came since the last replay, questions and replies included, is replayed with the next text
    that ``vestige.prefill`` reads. Until then it scores 0, so between two texts only ``window`` keeps it.
    """

    share: Share = "model"
    request: tuple[int, ...] | None = None
    """Token ids fed before each chunk. None tokenises ``REQUEST`` with the tokenizer that lies beside the model; a
    model that was never saved anywhere has none, and is asked nothing: chunks follow the text as they are."""
    replay_chunk: int = 2048
    """Tokens of the text that are replayed in one forward; fewer if the model has fewer positions left."""
    quoted: int = 8
    """Last tokens of the chunk before, with which the replay of a later chunk begins."""
    annotations: ClassVar[frozenset[str]] = frozenset({"asked"})
    query_annotations: ClassVar[frozenset[str]] = annotations
    reading_slack: ClassVar[float] = float("inf")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replay_chunk < 1 or self.quoted < 0:
            raise PolicyError(
                "replay_chunk must be at least 1 and quoted not negative, "
                f"got replay_chunk={self.replay_chunk}, quoted={self.quoted}"
            )

    def annotate(self, written: NewPairs) -> Mapping[str, Tensor]:
        """Return the mark of pairs that no replay has looked at yet: ``batch kv_heads new``."""
        return {"asked": torch.full(written.keys.shape[:3], _UNASKED, device=written.keys.device)}

    def prepare(self, model: Any, cache: ReplayCache, ids: Int[Tensor, "batch new"]) -> None:
        """Replay what came since the last replay, chunk by chunk, and write down what attention its pairs got.

        Raises:
            PolicyError: No tokenizer lies beside the model, the model was fed embeddings, or it has too few positions
                left for a replay.
        """
        request = _default_request(model) if self.request is None else self.request
        starts = _unasked_from(cache)
        texts = [row[real][start:] for row, real, start in zip(cache.ids, cache.real, starts, strict=True)]
        if any(bool((text < 0).any()) for text in texts):
            raise PolicyError("KVzip replays token ids, but the model was fed embeddings, of which it has none")
        longest = max(map(len, texts))
        size = self._chunk_size(cache, longest, len(request))
        for begin in range(0, longest, size):
            quote, end = max(begin - self.quoted, 0), begin + size
            rows = [[*request, *text[quote:end].tolist()] if begin < len(text) else [] for text in texts]
            spans = [range(start + begin, start + end) for start in starts]
            fed, mask = pad_left(rows, ids.device)
            replay(model, fed, cache, partial(self._ask, spans), mask)

    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return the most attention that a replay paid to each pair, 0 where none has looked."""
        return seen.annotations["asked"].float().clamp_min(0.0)

    def _chunk_size(self, cache: ReplayCache, longest: int, request: int) -> int:
        """Return how many tokens can be replayed in one forward."""
        limit, size = cache.layout.max_positions, min(self.replay_chunk, max(longest, 1))
        if limit is None:
            return size
        free = limit - max(cache.seen) - request - self.quoted
        if free < min(size, _LEAST_CHUNK):
            raise PolicyError(
                f"KVzip replays a text behind itself: after {max(cache.seen)} tokens that takes at least "
                f"{request + self.quoted + min(size, _LEAST_CHUNK)} of the model's {limit} positions, and "
                f"{limit - max(cache.seen)} are left"
            )
        return min(size, free)

    def _ask(self, spans: Sequence[range], glance: RowView) -> None:
        """Write down the most attention that the replay pays to each pair of a row's chunk.

        Args:
            spans: Positions that each batch row replays now.
            glance: The row.
        """
        span, at, own = spans[glance.batch], glance.positions, glance.positions >= glance.at[0]
        chunk = (at >= span.start) & (at < span.stop) & ~own
        first = (at >= 0) & (at < self.sink)
        slots = (chunk | first | own).nonzero()[:, 0]
        keys, positions = glance.keys[slots], at[slots]
        most = torch.zeros(len(slots), device=keys.device)
        for begin in range(0, len(glance.at), _BLOCK):
            block = slice(begin, begin + _BLOCK)
            weights = attention_weights(glance.queries[:, block], glance.at[block], keys, positions, glance.attention)
            most = torch.maximum(most, weights.amax((0, 1)))
        glance.annotations["asked"][chunk] = most[chunk[slots]]


def _unasked_from(cache: ReplayCache) -> list[int]:
    """Return the position of each batch row's first pair that no replay has looked at, or what it has seen."""
    firsts = list(cache.seen)
    for layer in cache.evictable:
        for row in range(layer.rows):
            pairs = slice(layer.starts[row], layer.starts[row] + layer.lengths[row])
            at = layer.positions(row)[(layer.columns["asked"][pairs] < 0) & (layer.positions(row) >= 0)]
            if len(at):
                batch = row // layer.kv_heads
                firsts[batch] = min(firsts[batch], int(at[0]))
    return firsts


def _default_request(model: Any) -> tuple[int, ...]:
    home: str = model.config.name_or_path
    return _tokenised(home) if home else ()


@lru_cache(maxsize=8)
def _tokenised(home: str) -> tuple[int, ...]:
    """Return the request in the chat text of the tokenizer that lies beside a model.

    Raises:
        PolicyError: There is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(home)
    except Exception as error:  # transformers raises many types, tokenizers a bare Exception
        raise PolicyError(
            f"KVzip asks the model to repeat the text, but no tokenizer lies beside {home!r} "
            f"({type(error).__name__}); give the request as token ids: KVzip(request=(...), ...)"
        ) from None
    return tuple(ChatTemplate(tokenizer).question(REQUEST)[0].tolist())
