"""Compactor: keys that are outliers, and tokens that their chunk attends to; independent of the question."""

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
from vestige.policies.observation import OUTLIERS, Observation, RowView
from vestige.policies.scoring import compute_attention, pool_scores
from vestige.policies.selection import Scale

_UNSCALED = AttentionScale(1.0)
_POOLED = 3  # neighbouring tokens
_RIDGE = 1e-4  # relative to the mean square of a sketched key's coordinates; keeps the factorisation well-posed
_TINY = 1e-6
_PRIME = 2**32 - 5  # torch uses the lowest 32 bits of a seed


@dataclass(frozen=True, kw_only=True)
class Compactor(Policy):
    """Keep the pairs whose keys are outliers of their row, or that tokens of the same chunk attend to, blended.

    The first part is the statistical leverage of each centred key before RoPE, in a random sketch. The second is the
    attention to a token, summed over all tokens of its chunk, later ones included, times the norm of its value, pooled
    over three neighbours. Both become z-scores over the layer's pairs, and ``blending`` weighs the first.

    Source: Compactor, arXiv 2507.08143, with the constants of the authors' code: as there, query-key products are not
    scaled, and ``blending`` is by default the share of pairs evicted. Differs: chunks begin at multiples of ``chunk``
    positions, within the tokens of one forward pass: text read in pieces that are no multiple of it has shorter chunks
    at their ends, and a generated token is a chunk of its own (it gets 1, the mean of any chunk). The first 4 tokens
    take no part, and their z-scores are 0; z-scores are taken over a batch row's pairs of a layer. Completed by us: the
    second part is computed when pairs are read and kept beside them, so that the cache can evict again in later turns
    and while decoding; leverage is then among the pairs still held.
    """

    blending: float | None = None
    """Weight of the leverage; None takes 1 - limit / seen, the share of the seen pairs that is evicted."""
    sketch: int = 48
    """Dimensions of the sketch; keys with no more dimensions are used unsketched."""
    chunk: int = 256
    """Tokens that attend to each other."""
    seed: int = 0
    """Seed of the sketch."""
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

    def annotate(self, new: NewPairs) -> Mapping[str, Tensor]:
        """Return 1 for each new pair, the value of a chunk of one token; `watch` overwrites it for longer chunks."""
        return {"chunk_attention": torch.ones_like(new.keys[..., 0], dtype=torch.float16)}

    def watch(self, view: RowView) -> None:
        """Store the attention to new pairs, summed over the new tokens of their chunk, averaged over the group."""
        at = view.query_positions
        if len(at) == 1:
            return
        start = max(int(at[0]), OUTLIERS)
        queries = view.queries[:, at >= start]
        new = (view.positions >= start).nonzero()[:, 0]
        for first, end in self._split_chunks(start, start + len(new)):
            part = slice(first - start, end - start)
            pairs, last = new[part], at.new_full((end - first,), end)  # all tokens of a chunk see each other
            weights = compute_attention(queries[:, part], last, view.keys[pairs], view.positions[pairs], _UNSCALED)
            view.annotations["chunk_attention"][pairs] = weights.sum(1).mean(0).half()

    def _split_chunks(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the bounds of the chunks between two positions; the first and last may be parts."""
        inner = range((start // self.chunk + 1) * self.chunk, end, self.chunk)
        bounds = [start, *inner, end]
        return [(first, end) for first, end in pairwise(bounds) if first < end]

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return blended z-scores of leverage and of chunk attention times the norm of the value."""
        assert obs.rope is not None, "the cache knows the rotation for every policy that needs it"
        keys = obs.rope.unrotate(obs.keys.float(), obs.positions, obs.layer_idx)
        counted = obs.positions >= OUTLIERS
        norms = torch.linalg.vector_norm(obs.values.float(), dim=-1)
        attended = obs.annotations["chunk_attention"].float() * norms * counted
        leverage = torch.zeros_like(norms)
        batch = torch.zeros(len(norms), dtype=torch.long, device=norms.device)
        for row in obs.rows():
            sketch = self._draw_sketch(keys, obs.layer_idx, row.kv_head)
            leverage[row.pairs] = _compute_leverage(keys[row.pairs], counted[row.pairs], sketch)
            attended[row.pairs] = pool_scores(attended[row.pairs], _POOLED)
            batch[row.pairs] = row.batch
        scores = torch.zeros_like(norms)
        for b, (length, limit) in enumerate(zip(obs.seen, obs.pair_limits, strict=True)):
            among = counted & (batch == b)
            weight = max(1 - limit / max(length, 1), 0.0) if self.blending is None else self.blending
            scores[among] = weight * _standardize(leverage[among]) + _standardize(attended[among])
        return scores

    def _draw_sketch(self, keys: Tensor, layer_idx: int, kv_head: int) -> Float[Tensor, "head_dim sketched"] | None:
        """Return the random sketch of one KV head of a layer, the same for all batch rows and evictions."""
        size = keys.shape[-1]
        if size <= self.sketch:
            return None
        number = (self.seed * 1009 + layer_idx) * 1009 + kv_head
        generator = torch.Generator().manual_seed(number % _PRIME)
        drawn = torch.randn(size, self.sketch, generator=generator) / math.sqrt(self.sketch)
        return drawn.to(keys.device)


def _compute_leverage(
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


def _standardize(scores: Float[Tensor, " some"]) -> Float[Tensor, " some"]:
    """Return the z-score of each score."""
    count = max(len(scores), 1)
    centred = scores - scores.sum() / count
    return centred / (centred.square().sum() / count).sqrt().clamp_min(_TINY)
