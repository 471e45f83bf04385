"""Attention over a part of the pairs, and putting two parts together."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class PartialAttention:
    """What queries read from some of the pairs, and how much these weigh.

    Args:
        output: Softmax-weighted mean of the values, as if there were no other pairs.
        lse: Log of the sum of ``exp(logit)`` over the pairs: what their part of the softmax weighs. Large and negative
            where there are none.
    """

    output: Float[Tensor, "*queries value_dim"]
    lse: Float[Tensor, "*queries"]


@dataclass(frozen=True)
class AdditiveOutput:
    """What is added to attention over the kept pairs, outside its softmax.

    Args:
        output: Zeros where there is nothing to add.
    """

    output: Float[Tensor, "*queries value_dim"]


def merge(kept: PartialAttention, evicted: PartialAttention) -> Float[Tensor, "*queries value_dim"]:
    """Return attention over both parts: exact if both are.

    ``(e^a x + e^b y) / (e^a + e^b)`` is ``x`` moved towards ``y`` by ``sigmoid(b - a)``, which cannot overflow. Where
    the evicted part weighs nothing the kept output comes back bit for bit.
    """
    share = torch.sigmoid(evicted.lse.to(kept.lse.dtype) - kept.lse)
    return torch.lerp(kept.output, evicted.output.to(kept.output.dtype), share[..., None])
