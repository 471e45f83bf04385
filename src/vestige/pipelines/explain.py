"""Explain an answer: the attention that its evidence receives, and the pairs of the evidence that are held.

Source: attention dilution, "Make Each Token Count" (arXiv 2605.09649): one minus the share of a query's attention that
goes to useful tokens. Here it is the mean over all layers, query heads, and tokens of a question with its reply.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vestige.cache.kv_cache import KVCache
from vestige.errors import InputError
from vestige.models.forward import replay
from vestige.policies.observation import RowView
from vestige.policies.scoring import compute_attention
from vestige.spans import Span, within

Paid = Float[Tensor, "kv_heads evidence"]
"""Attention that each token of the evidence receives in one layer; 0 where its pair was evicted."""
Held = Bool[Tensor, "kv_heads evidence"]
"""Whether one layer holds each pair of the evidence."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Attention of one question to its evidence, by layer, with all pairs and with the kept ones."""

    evidence: Int[Tensor, " evidence"]
    """Positions of the tokens of the evidence."""
    full: tuple[Paid, ...]
    kept: tuple[Paid, ...]
    held: tuple[Held, ...]

    @property
    def dilution_full(self) -> float:
        """Share of attention that goes to other tokens when all pairs are held."""
        return 1.0 - mean_attention(self.full)

    @property
    def dilution_kept(self) -> float:
        """Share of attention that goes to other tokens when only the kept pairs are held."""
        return 1.0 - mean_attention(self.kept)

    @property
    def held_share(self) -> float:
        """Share of the evidence's pairs that are held."""
        return float(torch.cat([layer.flatten() for layer in self.held]).float().mean())

    @property
    def attention_held(self) -> float:
        """Share of the evidence's attention, measured with all pairs, whose pairs are held."""
        return kept_attention(self.full, self.held)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON; for each layer and KV head a number, or the positions of the held pairs."""
        return {
            "evidence": self.evidence.tolist(),
            "dilution_full": self.dilution_full,
            "dilution_kept": self.dilution_kept,
            "held_share": self.held_share,
            "attention_held": self.attention_held,
            "layers": [
                {
                    "attention_full": _means(full),
                    "attention_kept": _means(kept),
                    "held_share": held.float().mean(1).tolist(),
                    "held": [self.evidence[row].tolist() for row in held],
                }
                for full, kept, held in zip(self.full, self.kept, self.held, strict=True)
            ],
        }


def attention_to(
    model: PreTrainedModel, cache: KVCache, ids: Int[Tensor, "1 new"], evidence: Int[Tensor, " evidence"]
) -> tuple[Paid, ...]:
    """Return for each layer the attention of ids to pairs at some positions, the mean over ids and query heads.

    Args:
        model: An attached model.
        cache: A cache of one batch row with the text before the ids; it is not changed.
        ids: Ids of a question and its reply, for example.
        evidence: Positions, ascending.
    """
    paid = {layer.layer_idx: torch.zeros(layer.kv_heads, len(evidence)) for layer in cache.evictable}

    def watch(row: RowView) -> None:
        weights = compute_attention(row.queries, row.query_positions, row.keys, row.positions, row.attention)
        weights = weights.mean((0, 1)).cpu()
        positions = row.positions.cpu()
        is_evidence = torch.isin(positions, evidence)
        at = torch.searchsorted(evidence, positions[is_evidence].to(evidence.dtype))
        paid[row.layer_idx][row.kv_head, at] = weights[is_evidence]

    replay(model, ids.to(model.device), cache, watch)
    return tuple(paid.values())


def find_held(cache: KVCache, evidence: Int[Tensor, " evidence"]) -> tuple[Held, ...]:
    """Return for each layer whether a cache of one batch row holds the pairs at some positions."""
    return tuple(
        torch.stack([torch.isin(evidence, layer.positions(row).cpu()) for row in range(layer.rows)])
        for layer in cache.evictable
    )


def explain(
    model: PreTrainedModel, full: KVCache, cache: KVCache, ids: Int[Tensor, "1 new"], spans: Sequence[Span]
) -> Explanation:
    """Compare the attention to some spans with all pairs and with the pairs that a cache kept; no cache is changed.

    Args:
        model: An attached model.
        full: A cache that has read the same text and evicted nothing.
        cache: The cache to explain, of one batch row.
        ids: Ids of a question and its reply.
        spans: Positions of the evidence.

    Raises:
        InputError: A cache of several batch rows, caches that read different texts, or no evidence in them.
    """
    if len(cache.seen) != 1 or cache.seen != full.seen:
        raise InputError(f"one text is explained at a time, read by both caches; they saw {full.seen} and {cache.seen}")
    evidence = within(torch.arange(cache.seen[0]), spans).nonzero()[:, 0]
    if not len(evidence):
        raise InputError(f"no token of the evidence is among the {cache.seen[0]} that were read")
    return Explanation(
        evidence=evidence,
        full=attention_to(model, full, ids, evidence),
        kept=attention_to(model, cache, ids, evidence),
        held=find_held(cache, evidence),
    )


def mean_attention(paid: Sequence[Paid]) -> float:
    """Return the attention that the whole evidence receives, the mean over layers and heads."""
    return float(torch.cat([layer.sum(1) for layer in paid]).mean())


def kept_attention(paid: Sequence[Paid], held: Sequence[Held]) -> float:
    """Return the share of attention that goes to held pairs; 1 if there is no attention."""
    total = sum(float(layer.sum()) for layer in paid)
    kept = sum(float((layer * mask).sum()) for layer, mask in zip(paid, held, strict=True))
    return kept / total if total else 1.0


def _means(paid: Paid) -> list[float]:
    return paid.sum(1).tolist()
