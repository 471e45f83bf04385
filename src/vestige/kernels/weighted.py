"""Attention over pairs each of which stands for several."""

from jaxtyping import Float
from torch import Tensor

from vestige.kernels import AttentionScale
from vestige.kernels.fused import fused, fuses
from vestige.kernels.merge import PartialAttention


def attend_weighted(
    queries: Float[Tensor, "rows queries head_dim"],
    keys: Float[Tensor, "rows held head_dim"],
    values: Float[Tensor, "rows held value_dim"],
    log_mass: Float[Tensor, "rows held"],
    scale: AttentionScale,
) -> PartialAttention:
    """Return what each row's queries read from its pairs, where a pair weighs as much as ``exp(log_mass)`` of its kind.

    Args:
        queries: After RoPE, in float32.
        keys: In float32.
        values: In float32.
        log_mass: Finite: where a pair stands for nothing, large and negative.
        scale: Factor and softcap of the layer.
    """
    bias = log_mass[:, None]
    if scale.softcap is None and fuses(queries, keys, values, log_mass):
        output, lse = fused(queries[None], keys[None], values[None], scale.scaling, bias[None])
        return PartialAttention(output[0], lse[0])
    logits = scale.capped(queries * scale.scaling @ keys.mT) + bias
    return PartialAttention(logits.softmax(-1) @ values, logits.logsumexp(-1))
