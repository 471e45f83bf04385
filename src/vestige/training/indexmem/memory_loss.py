"""The memory's loss: the error of attention after an eviction, with a memory of the evicted pairs.

Source: IndexMem, arXiv 2605.25475: the squared error of attention's output with the memory, on later tokens. Differs:
each layer's error is measured against the size of its own output, so that no layer outweighs the others.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vestige.kernels.merge import AdditiveOutput, PartialAttention, merge
from vestige.memory.base import EvictedPairs, LayerMemory, Memory
from vestige.memory.linear import Linear
from vestige.memory.slots import Slots
from vestige.nn.indexer import Indexer
from vestige.nn.latent_memory import Latent
from vestige.training.indexmem.indexer_loss import max_index_scores_of_text
from vestige.training.indexmem.teacher_trace import LayerTrace


def memory_loss(
    latents: Sequence[Latent], layers: Sequence[LayerTrace], kept: Sequence[Bool[Tensor, "kv_heads text"]]
) -> tuple[Float[Tensor, " latents"], Float[Tensor, ""]]:
    """Return the attention error of the tokens after a text with each memory of the evicted pairs, and without one.

    Args:
        latents: Receive the gradients.
        layers: Traces of a text and the tokens after it.
        kept: Pairs of the text that each layer keeps.
    """
    memories = [make_memory(latent) for latent in latents]
    errors, plain = [], []
    for layer, stays in zip(layers, kept, strict=True):
        whole, left = (attend_to_pairs(layer, stays.shape[1], seen) for seen in (torch.ones_like(stays), stays))
        size = whole.output.square().mean()
        outputs = [
            attend_with_memory(left, _absorb_evicted(memory, layer, stays), layer, stays.shape[1])
            for memory in memories
        ]
        errors.append(torch.stack([(output - whole.output).square().mean() / size for output in outputs]))
        plain.append((left.output - whole.output).square().mean() / size)
    return torch.stack(errors).mean(0), torch.stack(plain).mean()


def make_memory(latent: Latent) -> Memory:
    """Return a memory with these weights, whose state is in float32."""
    cls = {"linear": Linear, "slots": Slots}[latent.config.kind]
    return cls(latent=latent, dtype="float32")


@torch.no_grad()
def attend_to_pairs(layer: LayerTrace, text: int, seen: Bool[Tensor, "kv_heads text"]) -> PartialAttention:
    """Return the attention of the tokens after a text over some of its pairs and over themselves."""
    heads, tokens, _ = layer.queries.shape
    groups = heads // len(layer.keys)
    visible = torch.nn.functional.pad(seen, (0, tokens - text), value=True).repeat_interleave(groups, 0)
    logits = layer.logits(slice(text, tokens)).masked_fill(~visible[:, None], -torch.inf)
    lse = layer.log_normalizer(logits)
    return PartialAttention((logits - lse[..., None]).exp() @ layer.values.repeat_interleave(groups, 0), lse)


@torch.no_grad()
def select_pairs(
    indexer: Indexer, layers: Sequence[LayerTrace], text: int, fraction: float, *, sink: int, window: int
) -> list[Bool[Tensor, "kv_heads text"]]:
    """Return masks of the pairs that the policy would keep by the indexer's scores of the text.

    Args:
        indexer: If its scores are apart, all pairs of the model compete; else each KV head keeps equally many.
        layers: Traces of the text.
        text: Number of tokens of the text.
        fraction: Share of the pairs that is kept.
        sink: First tokens, which are kept.
        window: Latest tokens, which are kept.
    """
    room = min(max(round(fraction * text), sink + window), text)
    scores = []
    for layer in layers:
        best = max_index_scores_of_text(indexer.at(layer.layer_idx), layer, text)
        share = best - best[:, sink:].logsumexp(-1, keepdim=True) + indexer.log_scale(layer.layer_idx)[:, None]
        share[:, :sink], share[:, max(text - window, 0) :] = torch.inf, torch.inf
        scores.append(share)
    rows = torch.cat(scores)
    competing = rows.view(1, -1) if indexer.config.apart else rows
    winners = competing.topk(room * rows.numel() // competing.shape[0] // text, -1).indices
    stays = torch.zeros_like(competing, dtype=torch.bool).scatter_(1, winners, True).view_as(rows)
    return list(stays.split([len(layer.keys) for layer in layers]))


def attend_with_memory(
    left: PartialAttention, memory: LayerMemory, layer: LayerTrace, text: int
) -> Float[Tensor, "heads following value_dim"]:
    """Return the attention of the tokens after a text over the kept pairs and the memory of the evicted ones."""
    recalled = memory.recall(layer.queries[None, :, text:], slice(0, len(layer.keys)), layer.scale)
    both: Tensor = left.output + recalled.output if isinstance(recalled, AdditiveOutput) else merge(left, recalled)
    return both[0]


def _absorb_evicted(memory: Memory, layer: LayerTrace, stays: Bool[Tensor, "kv_heads text"]) -> LayerMemory:
    """Return a memory of the pairs that do not stay. All pairs are passed; kept ones have zeros and position -1."""
    kv_heads, text = stays.shape
    evicted = ~stays
    pairs = EvictedPairs(
        layer_idx=layer.layer_idx,
        counts=evicted.sum(1),
        keys=layer.keys[:, :text] * evicted[..., None],
        values=layer.values[:, :text] * evicted[..., None],
        positions=torch.where(evicted, torch.arange(text, device=stays.device), -1).to(torch.int32),
    )
    empty = memory.empty(kv_heads, layer.keys.shape[2], layer.values.shape[2], layer.keys.device)
    return LayerMemory(memory=memory, layer_idx=layer.layer_idx, state=memory.absorb(empty, pairs))
