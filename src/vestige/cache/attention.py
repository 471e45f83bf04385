"""The attention function that transformers calls on an attached model.

It receives handles instead of keys and values (``handle.Handle``), records what policies want to see, and sends the
query to plain attention while the layer is dense, to a ragged kernel once pairs were evicted. Anything that is not a
handle (another cache, a sliding layer, a vision tower) is attended to as if vestige were not there.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vestige.cache.forward_pass import ForwardPass
from vestige.cache.handle import KVHandle
from vestige.cache.layer import RaggedLayer
from vestige.cache.overlay import OverlayLayer
from vestige.errors import ModelError
from vestige.kernels import AttentionScale, reference
from vestige.kernels.merge import AdditiveOutput, merge

NAME = "vestige"
"""The name under which the attention function and its mask are registered."""


def vestige_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over a layer's pairs; the signature and the result, ``batch new heads value_dim``, are transformers'."""
    scale = AttentionScale(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    if not isinstance(key, KVHandle):
        return _dense(module, query, key, value, attention_mask, scale, position_bias, kwargs)
    if isinstance(key.layer, OverlayLayer):
        return key.layer.attend(query, scale).transpose(1, 2).contiguous(), None
    layer, step = key.layer, key.layer.cache.step
    assert step is not None, "update has refused a forward that was never begun"
    if getattr(module, "layer_idx", layer.layer_idx) == layer.layer_idx:  # not a consumer of shared pairs
        layer.show(query, step, scale)
    if layer.ragged:
        if position_bias is not None:
            raise ModelError("position biases have no place beside evicted pairs; this model cannot be evicted")
        return _ragged(query, layer, step, scale).transpose(1, 2).contiguous(), None
    keys, values = layer.view("keys"), layer.view("values")
    return _dense(module, query, keys, values, attention_mask, scale, position_bias, kwargs)


def _ragged(query: Tensor, layer: RaggedLayer, step: ForwardPass, scale: AttentionScale) -> Tensor:
    """Attend over rows of different lengths; pads, which have no pairs, read 0."""
    if not step.padded:
        return _remembering(query, layer, slice(0, layer.rows), scale)
    out = query.new_zeros(*query.shape[:3], layer.columns["values"].shape[-1])
    missing = step.new - query.shape[2]  # layers that read the pairs of others may be fed the last tokens alone
    for b in range(query.shape[0]):
        rows, real = slice(b * layer.kv_heads, (b + 1) * layer.kv_heads), step.valid(b)
        real = real[real >= missing] - missing
        if len(real):
            out[b][:, real] = _remembering(query[b : b + 1, :, real], layer, rows, scale)[0]
    return out


def _remembering(query: Tensor, layer: RaggedLayer, rows: slice, scale: AttentionScale) -> Tensor:
    """Attend over some rows, all of whose queries are real, and over what a memory knows of their evicted pairs."""
    keys, values = layer.columns["keys"], layer.columns["values"]
    pairs = (query, keys, values, layer.starts[rows], layer.lengths[rows], scale)
    if layer.remains is None:
        return reference.attend(*pairs)
    recalled = layer.remains.recall(query, rows, scale)
    if isinstance(recalled, AdditiveOutput):
        return reference.attend(*pairs) + recalled.output.to(query.dtype)
    return merge(reference.attend_partially(*pairs), recalled).to(query.dtype)


def _dense(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: AttentionScale,
    position_bias: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attend over tensors: by sdpa, bit for bit, or by the formula where sdpa would refuse or drop a term."""
    if scale.softcap is None and scale.sinks is None and position_bias is None:
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=scale.scaling, **kwargs)
    causal = kwargs.get("is_causal")
    if mask is None and query.shape[2] > 1 and (getattr(module, "is_causal", True) if causal is None else causal):
        mask = reference.lower_right(query.shape[2], keys.shape[2], query.device)
    if position_bias is not None and mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else torch.zeros_like(mask, dtype=torch.bool)
        additive = torch.zeros((), dtype=query.dtype) if mask.dtype == torch.bool else mask
        mask = (position_bias + additive).masked_fill(hidden, torch.finfo(query.dtype).min)
    elif position_bias is not None:
        mask = position_bias
    out = reference.written_out(query, keys, values, mask, scale)
    return out.transpose(1, 2).contiguous(), None
