"""KVzip: pairs that the model attends to when it is asked to repeat the text."""

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
from vestige.policies.observation import Observation, RowView
from vestige.policies.scoring import compute_attention
from vestige.policies.selection import Share
from vestige.text.chat_template import ChatTemplate

REQUEST = "Repeat the previous context word for word."
"""Request to repeat the text, which the tokenizer's chat template wraps as a question."""

_UNSCORED = -1.0  # in the side array; attention is never below 0
_BLOCK = 256  # queries attended at a time
_LEAST_CHUNK = 64  # shorter chunks would take too many forward passes


@dataclass(frozen=True, kw_only=True)
class KVzip(Policy):
    """Keep the pairs that the model needs to repeat the text, whatever will be asked about it: one top-k model-wide.

    After a text was read, the model reads it once more after itself, in chunks, each after a request to repeat it. The
    score of a pair is the highest attention that any query of its chunk's replay pays to it. The replay is not kept. It
    takes about as long as reading, and memory for one chunk beside the whole text, which is held in full to its end.

    Source: KVzip, arXiv 2505.23416, and the code its authors published: as there, the softmax runs over the first
    tokens (``sink``), the chunk and the replay alone, so that the cost of scoring is linear in the text; the maximum is
    over the query group; raw scores compete. Differs: a later chunk's replay begins with the last tokens of the chunk
    before it, where the authors quote them in the request; attention is float32; the window is protected. KVzip+, which
    weights attention by norms of values and hidden states, is not supported: hidden states are not available.
    Completed by us: tokens that followed the last replay, questions and replies included, are replayed with the next
    text that ``vestige.prefill`` reads. Until then they score 0, so between two texts only ``window`` keeps them.
    """

    share: Share = "model"
    request: tuple[int, ...] | None = None
    """Token ids before each chunk. None tokenizes ``REQUEST`` with the tokenizer in the model's folder; a model without
    a folder gets no request: the chunks follow the text directly."""
    replay_chunk: int = 2048
    """Tokens of the text replayed in one forward pass; fewer if the model has fewer positions left."""
    quoted: int = 8
    """Last tokens of the previous chunk, with which the replay of a later chunk begins."""
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

    def annotate(self, new: NewPairs) -> Mapping[str, Tensor]:
        """Return the mark of pairs without a replay, ``batch kv_heads new``."""
        return {"asked": torch.full(new.keys.shape[:3], _UNSCORED, device=new.keys.device)}

    def prepare(self, model: Any, cache: ReplayCache, ids: Int[Tensor, "batch new"]) -> None:
        """Replay the tokens since the last replay, chunk by chunk, and record the attention to their pairs.

        Raises:
            PolicyError: The model's folder has no tokenizer, the model was fed embeddings, or it has too few positions
                left for a replay.
        """
        request = _find_request(model) if self.request is None else self.request
        starts = _find_unscored(cache)
        texts = [row[real][start:] for row, real, start in zip(cache.ids, cache.real, starts, strict=True)]
        if any(bool((text < 0).any()) for text in texts):
            raise PolicyError("KVzip replays token ids, but the model was fed embeddings, of which it has none")
        longest = max(map(len, texts))
        size = self._find_chunk_size(cache, longest, len(request))
        for begin in range(0, longest, size):
            quote, end = max(begin - self.quoted, 0), begin + size
            rows = [[*request, *text[quote:end].tolist()] if begin < len(text) else [] for text in texts]
            spans = [range(start + begin, start + end) for start in starts]
            fed, mask = pad_left(rows, ids.device)
            replay(model, fed, cache, partial(self._record_attention, spans), mask)

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return the highest attention of a replay to each pair, 0 before any replay."""
        return obs.annotations["asked"].float().clamp_min(0.0)

    def _find_chunk_size(self, cache: ReplayCache, longest: int, request: int) -> int:
        """Return the number of tokens that can be replayed in one forward pass."""
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

    def _record_attention(self, spans: Sequence[range], view: RowView) -> None:
        """Record the highest attention of the replay to each pair of a row's chunk, by the positions it replays."""
        span, positions, at = spans[view.batch], view.positions, view.query_positions
        own = positions >= at[0]
        chunk = (positions >= span.start) & (positions < span.stop) & ~own
        first = (positions >= 0) & (positions < self.sink)
        slots = (chunk | first | own).nonzero()[:, 0]
        keys, held = view.keys[slots], positions[slots]
        most = torch.zeros(len(slots), device=keys.device)
        for begin in range(0, len(at), _BLOCK):
            block = slice(begin, begin + _BLOCK)
            weights = compute_attention(view.queries[:, block], at[block], keys, held, view.attention)
            most = torch.maximum(most, weights.amax((0, 1)))
        view.annotations["asked"][chunk] = most[chunk[slots]]


def _find_unscored(cache: ReplayCache) -> list[int]:
    """Return the position of each batch row's first pair without a replay, or else its number of seen tokens."""
    firsts = list(cache.seen)
    for layer in cache.evictable:
        for row in range(layer.rows):
            pairs = slice(layer.starts[row], layer.starts[row] + layer.lengths[row])
            at = layer.positions(row)[(layer.columns["asked"][pairs] < 0) & (layer.positions(row) >= 0)]
            if len(at):
                batch = row // layer.kv_heads
                firsts[batch] = min(firsts[batch], int(at[0]))
    return firsts


def _find_request(model: Any) -> tuple[int, ...]:
    home: str = model.config.name_or_path
    return _tokenize_request(home) if home else ()


@lru_cache(maxsize=8)
def _tokenize_request(home: str) -> tuple[int, ...]:
    """Return the request in the chat template of the tokenizer in the model's folder."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(home)
    except Exception as error:  # transformers raises many types, tokenizers a bare Exception
        raise PolicyError(
            f"KVzip asks the model to repeat the text, but no tokenizer lies beside {home!r} "
            f"({type(error).__name__}); give the request as token ids: KVzip(request=(...), ...)"
        ) from None
    return tuple(ChatTemplate(tokenizer).question(REQUEST)[0].tolist())
