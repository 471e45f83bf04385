"""What an answer rests on: the attention that its evidence gets, and which of the evidence's pairs are left.

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
"""Attention that each token of the evidence gets in one layer; 0 where its pair was evicted."""
Held = Bool[Tensor, "kv_heads evidence"]
"""Which pairs of the evidence one layer holds."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One question's attention to its evidence, with all pairs and with those kept; by layer."""

    evidence: Int[Tensor, " evidence"]
    """Positions of its tokens."""
    full: tuple[Paid, ...]
    kept: tuple[Paid, ...]
    held: tuple[Held, ...]

    @property
    def dilution_full(self) -> float:
        """Attention that goes elsewhere while all pairs are there."""
        return 1.0 - share_of(self.full)

    @property
    def dilution_kept(self) -> float:
        """Attention that goes elsewhere with the pairs that were kept."""
        return 1.0 - share_of(self.kept)

    @property
    def held_share(self) -> float:
        """Pairs of the evidence that are left, over all of them."""
        return float(torch.cat([layer.flatten() for layer in self.held]).float().mean())

    @property
    def attention_held(self) -> float:
        """Of the attention that the evidence gets with all pairs, the share whose pairs are left."""
        return left_of(self.full, self.held)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON; by layer a number, or the positions of the pairs held, for each KV head."""
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
    """Return by layer the attention that ids pay to pairs at some positions, the mean over ids and query heads.

    Args:
        model: An attached model.
        cache: Of one batch row; holds what the ids attend to, and is the same afterwards.
        ids: A question and its reply, say.
        evidence: Positions, ascending.
    """
    paid = {layer.layer_idx: torch.zeros(layer.kv_heads, len(evidence)) for layer in cache.evictable}

    def watch(glance: RowView) -> None:
        scale = glance.attention
        weights = (
            compute_attention(glance.queries, glance.query_positions, glance.keys, glance.positions, scale)
            .mean((0, 1))
            .cpu()
        )
        positions = glance.positions.cpu()
        there = torch.isin(positions, evidence)
        at = torch.searchsorted(evidence, positions[there].to(evidence.dtype))
        paid[glance.layer_idx][glance.kv_head, at] = weights[there]

    replay(model, ids.to(model.device), cache, watch)
    return tuple(paid.values())


def held_of(cache: KVCache, evidence: Int[Tensor, " evidence"]) -> tuple[Held, ...]:
    """Return by layer which pairs at some positions a cache of one batch row still holds."""
    return tuple(
        torch.stack([torch.isin(evidence, layer.positions(row).cpu()) for row in range(layer.rows)])
        for layer in cache.evictable
    )


def held_by_kind(cache: KVCache, kinds: Int[Tensor, " seen"]) -> dict[int, float]:
    """Return, of the tokens of each kind, the share whose pairs a cache of one batch row still holds.

    Args:
        cache: Looked at; the mean is over its layers and heads.
        kinds: Of each token that was read, such as a VLM processor's ``mm_token_type_ids``: 0 text, 1 image, 2 video.

    Raises:
        InputError: Not as many kinds as tokens.
    """
    if list(cache.seen) != [len(kinds)]:
        raise InputError(f"{len(kinds)} kinds were given for the {cache.seen} tokens that were read")
    held = torch.cat(held_of(cache, torch.arange(len(kinds)))).float().mean(0)
    return {int(kind): float(held[kinds.cpu() == kind].mean()) for kind in kinds.unique()}


def explain(
    model: PreTrainedModel, full: KVCache, cache: KVCache, ids: Int[Tensor, "1 new"], spans: Sequence[Span]
) -> Explanation:
    """Compare the attention to some spans with all pairs and with those that a cache kept; neither is changed.

    Args:
        model: An attached model.
        full: Has read the same text and evicted nothing.
        cache: What is explained, of one batch row.
        ids: A question and its reply.
        spans: The evidence.

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
        held=held_of(cache, evidence),
    )


def share_of(paid: Sequence[Paid]) -> float:
    """Return the attention that all of the evidence gets: the mean over layers and heads."""
    return float(torch.cat([layer.sum(1) for layer in paid]).mean())


def left_of(paid: Sequence[Paid], held: Sequence[Held]) -> float:
    """Return the share of some attention that goes to pairs which are held; 1 if there is none."""
    whole = sum(float(layer.sum()) for layer in paid)
    left = sum(float((layer * there).sum()) for layer, there in zip(paid, held, strict=True))
    return left / whole if whole else 1.0


def _means(paid: Paid) -> list[float]:
    return paid.sum(1).tolist()
