"""Attention over weighted pairs, each of which represents several."""

from jaxtyping import Float
from torch import Tensor

from vestige.kernels import AttentionScale
from vestige.kernels.fused import can_fuse, fused
from vestige.kernels.merge import PartialAttention


def attend_weighted(
    queries: Float[Tensor, "rows queries head_dim"],
    keys: Float[Tensor, "rows held head_dim"],
    values: Float[Tensor, "rows held value_dim"],
    log_mass: Float[Tensor, "rows held"],
    scale: AttentionScale,
) -> PartialAttention:
    """Return the attention of each row's queries over its pairs, where a pair counts ``exp(log_mass)`` times.

    All inputs are in float32, queries after RoPE. ``log_mass`` is finite; large and negative for a pair without weight.
    """
    bias = log_mass[:, None]
    if scale.softcap is None and can_fuse(queries, keys, values, log_mass):
        output, lse = fused(queries[None], keys[None], values[None], scale.scaling, bias[None])
        return PartialAttention(output[0], lse[0])
    logits = scale.capped(queries * scale.scaling @ keys.mT) + bias
    return PartialAttention(logits.softmax(-1) @ values, logits.logsumexp(-1))
