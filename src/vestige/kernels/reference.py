"""The reference kernel: plain torch, one scaled-dot-product call per row, or one for all rows if they are equally long.

Rows are cut from the flat buffer as views, so no pair is copied or padded. A step of one token packs the query group
into the query axis, in as few torch calls as possible: there are hundreds of rows, and each call costs more than its
arithmetic. A longer piece attends block by block with a lower-right causal mask, so that keys after the last query of a
block are not read.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vestige.kernels import AttentionScale
from vestige.kernels.fused import can_fuse, fused
from vestige.kernels.merge import PartialAttention

QUERY_BLOCK = 256
"""Queries per call in a piece of text; the fastest value measured between 64 and 1024."""


def attend(
    query: Float[Tensor, "batch heads new head_dim"],
    keys: Float[Tensor, "slots head_dim"],
    values: Float[Tensor, "slots value_dim"],
    starts: Sequence[int],
    lengths: Sequence[int],
    scale: AttentionScale,
) -> Float[Tensor, "batch heads new value_dim"]:
    """Return the attention of new queries over each row's pairs, the last ``new`` of which are theirs, causally.

    Args:
        query: Queries after RoPE; query head h reads KV head ``h // queries_per_kv``.
        keys: Flat buffer; row ``batch_idx * kv_heads + head`` is ``keys[starts[row] : starts[row] + lengths[row]]``.
        values: Flat buffer of the same layout.
        starts: First slot of each row.
        lengths: Pairs of each row, at least ``new``.
        scale: Factor, softcap and sinks of the layer.
    """
    if query.shape[2] == 1 and scale.softcap is None and scale.sinks is None:
        rows = _split_one_token(query, keys, values, starts, lengths)
        out = [scaled_dot_product_attention(*row, scale=scale.scaling) for row in rows]
    else:
        out = [_attend_rows(*piece) for piece in _split_rows(query, keys, values, starts, lengths, scale)]
    return _concatenate(out).reshape(*query.shape[:3], -1)


def attend_partially(
    query: Float[Tensor, "batch heads new head_dim"],
    keys: Float[Tensor, "slots head_dim"],
    values: Float[Tensor, "slots value_dim"],
    starts: Sequence[int],
    lengths: Sequence[int],
    scale: AttentionScale,
) -> PartialAttention:
    """Return the output of :func:`attend`, in float32 or wider, and the weight of the pairs, sinks included.

    The formula is computed step by step, except for one token where a fused kernel returns the weight. The arguments
    are those of :func:`attend`.
    """
    if query.shape[2] == 1 and scale.softcap is None and can_fuse(query, keys, values):
        parts = [fused(*row, scale.scaling) for row in _split_one_token(query, keys, values, starts, lengths)]
    else:
        parts = [_attend_rows_partially(*piece) for piece in _split_rows(query, keys, values, starts, lengths, scale)]
    outputs, masses = zip(*parts, strict=True)
    wide = torch.promote_types(query.dtype, torch.float32)
    output = _concatenate(outputs).reshape(*query.shape[:3], -1).to(wide)
    return _add_sinks(PartialAttention(output, _concatenate(masses).reshape(query.shape[:3]).to(wide)), scale)


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), 1)


def _split_one_token(
    query: Tensor, keys: Tensor, values: Tensor, starts: Sequence[int], lengths: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield queries, keys and values, ``1 rows ...``, of one token: in one view if possible, else row by row."""
    packed = query.reshape(1, len(lengths), -1, query.shape[-1])
    stride = _find_stride(starts, lengths)
    if stride:
        size = (1, len(lengths), lengths[0])
        yield packed, _view_rows(keys, size, stride, starts[0]), _view_rows(values, size, stride, starts[0])
        return
    keys, values = keys[None, None], values[None, None]
    for group, start, length in zip(packed.split(1, 1), starts, lengths, strict=True):
        yield group, keys.narrow(2, start, length), values.narrow(2, start, length)


def _split_rows(
    query: Tensor, keys: Tensor, values: Tensor, starts: Sequence[int], lengths: Sequence[int], scale: AttentionScale
) -> Iterator[tuple[Tensor, Tensor, Tensor, AttentionScale]]:
    """Yield queries, keys, values and scale: all rows in one view if possible, else row by row."""
    kv_heads = len(lengths) // query.shape[0]
    stride = _find_stride(starts, lengths)
    if stride:
        size = (query.shape[0], kv_heads, lengths[0])
        yield query, _view_rows(keys, size, stride, starts[0]), _view_rows(values, size, stride, starts[0]), scale
        return
    for b in range(query.shape[0]):
        for head, group in enumerate(query[b : b + 1].chunk(kv_heads, dim=1)):
            row = b * kv_heads + head
            pairs = slice(starts[row], starts[row] + lengths[row])
            yield group, keys[pairs][None, None], values[pairs][None, None], scale.of_group(head, kv_heads)


def _find_stride(starts: Sequence[int], lengths: Sequence[int]) -> int:
    """Return the distance between rows if one strided view covers them (equal lengths, even spacing), else 0."""
    if len(set(lengths)) != 1:
        return 0
    stride = starts[1] - starts[0] if len(starts) > 1 else max(lengths[0], 1)
    return stride if all(start == starts[0] + i * stride for i, start in enumerate(starts)) else 0


def _view_rows(flat: Tensor, size: tuple[int, int, int], stride: int, offset: int) -> Tensor:
    """Return ``batch kv_heads held dim`` as a view of the flat buffer."""
    (batch, kv_heads, held), dim = size, flat.shape[1]
    strides = (kv_heads * stride * dim, stride * dim, dim, 1)
    return flat.as_strided((batch, kv_heads, held, dim), strides, flat.storage_offset() + offset * dim)


def _attend_rows(
    query: Float[Tensor, "batch heads new head_dim"],
    keys: Float[Tensor, "batch kv_heads held head_dim"],
    values: Float[Tensor, "batch kv_heads held value_dim"],
    scale: AttentionScale,
) -> Float[Tensor, "batch heads new value_dim"]:
    """Attend over rows of equal length, all in one call for each block of queries."""
    new, held = query.shape[2], keys.shape[2]
    if scale.softcap is not None or scale.sinks is not None:
        return written_out(query, keys, values, lower_right(new, held, query.device), scale)
    blocks = []
    for start in range(0, new, QUERY_BLOCK):
        block = query[:, :, start : start + QUERY_BLOCK]
        end = held - new + start + block.shape[2]
        mask = lower_right(block.shape[2], end, query.device)
        blocks.append(attend_masked(block, keys[:, :, :end], values[:, :, :end], mask, scale))
    return torch.cat(blocks, 2)


def attend_masked(
    query: Float[Tensor, "batch heads new head_dim"],
    keys: Float[Tensor, "batch kv_heads held head_dim"],
    values: Float[Tensor, "batch kv_heads held value_dim"],
    visible: Bool[Tensor, "new held"],
    scale: AttentionScale,
) -> Float[Tensor, "batch heads new value_dim"]:
    """Attend under a mask, for queries that lie between pairs instead of after them."""
    if scale.softcap is not None or scale.sinks is not None:
        return written_out(query, keys, values, visible, scale)
    gqa = query.shape[1] != keys.shape[1]
    return scaled_dot_product_attention(query, keys, values, visible, scale=scale.scaling, enable_gqa=gqa)


def _attend_rows_partially(
    query: Float[Tensor, "batch heads new head_dim"],
    keys: Float[Tensor, "batch kv_heads held head_dim"],
    values: Float[Tensor, "batch kv_heads held value_dim"],
    scale: AttentionScale,
) -> tuple[Tensor, Tensor]:
    """Attend over rows of equal length by the formula; return the output and the log-sum-exp."""
    batch, heads, new, _ = query.shape
    kv_heads, held = keys.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, values = keys.to(wide), values.to(wide)
    outputs, masses = [], []
    for start in range(0, new, QUERY_BLOCK):
        block = query[:, :, start : start + QUERY_BLOCK].to(wide)
        size, end = block.shape[2], held - new + start + block.shape[2]
        packed = block.reshape(batch, kv_heads, -1, block.shape[3])  # (batch, kv_heads, queries_per_kv * size, dim)
        logits = (packed @ keys[:, :, :end].mT * scale.scaling).view(batch, heads, size, end)
        logits = scale.capped(logits)
        if size > 1:
            logits = logits.masked_fill(~lower_right(size, end, query.device), -torch.inf)
        lse = logits.logsumexp(-1)
        weights = (logits - lse[..., None]).exp().view(batch, kv_heads, -1, end)
        outputs.append((weights @ values[:, :, :end]).view(batch, heads, size, -1))
        masses.append(lse)
    return torch.cat(outputs, 2), torch.cat(masses, 2)


def _add_sinks(partial: PartialAttention, scale: AttentionScale) -> PartialAttention:
    """Return partial attention with the layer's sinks, if any, in the softmax."""
    if scale.sinks is None:
        return partial
    lse = torch.logaddexp(partial.lse, scale.sinks.to(partial.lse.dtype)[:, None])
    return PartialAttention(partial.output * (partial.lse - lse).exp()[..., None], lse)


def lower_right(new: int, held: int, device: torch.device) -> Bool[Tensor, "new held"]:
    """Return the causal mask of the last ``new`` of ``held`` tokens: the last query sees all."""
    return torch.ones(new, held, dtype=torch.bool, device=device).tril(held - new)


def written_out(
    query: Float[Tensor, "batch heads new head_dim"],
    keys: Float[Tensor, "batch kv_heads held head_dim"],
    values: Float[Tensor, "batch kv_heads held value_dim"],
    mask: Tensor | None,
    scale: AttentionScale,
) -> Float[Tensor, "batch heads new value_dim"]:
    """Attend by the formula, for softcap (Gemma 2) and sinks (gpt_oss), which fused kernels lack.

    ``mask`` is bool (True is visible) or additive, and broadcasts to ``batch heads new held``; None hides nothing.
    """
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    logits = scale.capped(query @ keys.transpose(-1, -2) * scale.scaling)
    if mask is not None:
        lowest = torch.finfo(logits.dtype).min  # as in eager attention: a row without visible pairs stays finite
        logits = logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask
    if scale.sinks is None:
        weights = logits.softmax(-1, dtype=torch.float32)
    else:
        sink = scale.sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, sink], -1).softmax(-1, dtype=torch.float32)[..., :-1]
    return weights.to(values.dtype) @ values
