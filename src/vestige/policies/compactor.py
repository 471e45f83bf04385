"""Keep keys that stand out from the others, and what tokens nearby attend to: no question needed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vestige.errors import PolicyError
from vestige.kernels import AttentionScale
from vestige.policies.base import NewPairs, Policy
from vestige.policies.observation import OUTLIERS, Observation, RowView, attention_weights, pooled
from vestige.policies.selection import Scale

_UNSCALED = AttentionScale(1.0)
_POOLED = 3  # neighbouring tokens
_RIDGE = 1e-4  # of the mean square of a sketched key's coordinates: keeps the factorisation well-posed
_TINY = 1e-6
_PRIME = 2**32 - 5  # torch looks at the lowest 32 bits of a seed


@dataclass(frozen=True, kw_only=True)
class Compactor(Policy):
    """Keep the pairs whose keys are outliers of their row, or that tokens of the same chunk attend to, blended.

    The first part is the statistical leverage of each key before RoPE, centred, in a random sketch; the second the
    attention that all tokens of a chunk, later ones too, pay to a token, summed, times the norm of its value, pooled
    over three neighbours. Both become z-scores over the layer's pairs, and ``blending`` weighs the first.

    Source: Compactor, arXiv 2507.08143, with the constants of the authors' code: as there, query-key products are not
    scaled, and ``blending`` is by default the share of pairs that goes. Differs: chunks begin at multiples of ``chunk``
    positions, within what one forward brings: text read in pieces that are no multiple of it has shorter chunks at
    their ends, and a generated token is alone in its own (it gets 1, the mean of any chunk). The first 4 tokens take no
    part, and their z-scores are 0; z-scores are taken over a batch row's pairs of a layer. Completed by us: the second
    part is computed when pairs are read and kept beside them, so that room can be made again in later turns and while
    decoding; then leverage is among the pairs still held.
    """

    blending: float | None = None
    """Weight of the leverage; None takes 1 - room / seen, the share of the pairs seen that goes."""
    sketch: int = 48
    """Dimensions that keys are sketched to; keys that have no more are taken as they are."""
    chunk: int = 256
    """Tokens that attend to each other."""
    seed: int = 0
    """Of the sketch."""
    needs: ClassVar[frozenset[str]] = frozenset({"rope"})
    annotations: ClassVar[frozenset[str]] = frozenset({"chunk_attention"})
    query_annotations: ClassVar[frozenset[str]] = annotations
    annotation_options: ClassVar[tuple[str, ...]] = ("chunk",)
    scale: Scale = "signed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sketch < 1 or self.chunk < 1:
            raise PolicyError(f"sketch and chunk must be at least 1, got sketch={self.sketch!r}, chunk={self.chunk!r}")
        if self.blending is not None and not (math.isfinite(self.blending) and self.blending >= 0):
            raise PolicyError(f"blending must be None or a number that is not negative, got {self.blending!r}")

    def annotate(self, written: NewPairs) -> Mapping[str, Tensor]:
        """Return 1 for each new pair, what a token alone in its chunk gets; `watch` knows better when more come."""
        return {"chunk_attention": torch.ones_like(written.keys[..., 0], dtype=torch.float16)}

    def watch(self, glance: RowView) -> None:
        """Write the attention that new pairs get from the new tokens of their chunk, summed, meaned over the group."""
        if len(glance.at) == 1:
            return
        start = max(int(glance.at[0]), OUTLIERS)
        queries = glance.queries[:, glance.at >= start]
        new = (glance.positions >= start).nonzero()[:, 0]
        for first, end in self._chunks(start, start + len(new)):
            part = slice(first - start, end - start)
            pairs, everyone = new[part], glance.at.new_full((end - first,), end)  # all see all: none is later
            weights = attention_weights(
                queries[:, part], everyone, glance.keys[pairs], glance.positions[pairs], _UNSCALED
            )
            glance.annotations["chunk_attention"][pairs] = weights.sum(1).mean(0).half()

    def _chunks(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the bounds of the chunks, or of their parts, from one position to another."""
        inner = range((start // self.chunk + 1) * self.chunk, end, self.chunk)
        bounds = [start, *inner, end]
        return [(first, end) for first, end in pairwise(bounds) if first < end]

    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return blended z-scores of leverage and of chunk attention times the norm of the value."""
        assert seen.rope is not None, "the cache knows the rotation for every policy that needs it"
        keys = seen.rope.unrotate(seen.keys.float(), seen.positions, seen.layer_idx)
        counted = seen.positions >= OUTLIERS
        norms = torch.linalg.vector_norm(seen.values.float(), dim=-1)
        attended = seen.annotations["chunk_attention"].float() * norms * counted
        leverage = torch.zeros_like(norms)
        batch = torch.zeros(len(norms), dtype=torch.long, device=norms.device)
        for row in seen.rows():
            sketch = self._sketch(keys, seen.layer_idx, row.kv_head)
            leverage[row.pairs] = _leverage(keys[row.pairs], counted[row.pairs], sketch)
            attended[row.pairs] = pooled(attended[row.pairs], _POOLED)
            batch[row.pairs] = row.batch
        scores = torch.zeros_like(norms)
        for b, (length, room) in enumerate(zip(seen.seen, seen.pair_limits, strict=True)):
            among = counted & (batch == b)
            weight = max(1 - room / max(length, 1), 0.0) if self.blending is None else self.blending
            scores[among] = weight * _z(leverage[among]) + _z(attended[among])
        return scores

    def _sketch(self, keys: Tensor, layer_idx: int, kv_head: int) -> Float[Tensor, "head_dim sketched"] | None:
        """Return the random sketch of one KV head of a layer: the same for all batch rows and settles."""
        size = keys.shape[-1]
        if size <= self.sketch:
            return None
        number = (self.seed * 1009 + layer_idx) * 1009 + kv_head
        generator = torch.Generator().manual_seed(number % _PRIME)
        drawn = torch.randn(size, self.sketch, generator=generator) / math.sqrt(self.sketch)
        return drawn.to(keys.device)


def _leverage(
    keys: Float[Tensor, "row_held head_dim"],
    counted: Bool[Tensor, " row_held"],
    sketch: Float[Tensor, "head_dim sketched"] | None,
) -> Float[Tensor, " row_held"]:
    """Return the diagonal of ``X (X^T X + ridge)^-1 X^T`` for the centred, sketched keys; 0 where none is counted."""
    mean = (keys * counted[:, None]).sum(0) / counted.sum().clamp_min(1)
    centred = (keys - mean) * counted[:, None]
    x = centred if sketch is None else centred @ sketch
    gram = x.T @ x
    ridge = gram.diagonal().mean() * _RIDGE + _TINY
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), device=gram.device))
    whitened: Tensor = torch.linalg.solve_triangular(factor, x.T, upper=False)
    return whitened.square().sum(0)


def _z(scores: Float[Tensor, " some"]) -> Float[Tensor, " some"]:
    """Return how many standard deviations each score lies above the mean."""
    count = max(len(scores), 1)
    centred = scores - scores.sum() / count
    return centred / (centred.square().sum() / count).sqrt().clamp_min(_TINY)
