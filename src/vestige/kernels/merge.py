"""Attention over a part of the pairs, and the merge of two parts."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class PartialAttention:
    """Attention over some of the pairs, with their weight in the whole softmax.

    Args:
        output: Softmax-weighted mean of the values, as if there were no other pairs.
        lse: Log of the sum of ``exp(logit)`` over the pairs: their weight in the softmax. Large and negative where
            there are no pairs.
    """

    output: Float[Tensor, "*queries value_dim"]
    lse: Float[Tensor, "*queries"]


@dataclass(frozen=True)
class AdditiveOutput:
    """A term added to attention over the kept pairs, outside its softmax; zeros where there is nothing to add."""

    output: Float[Tensor, "*queries value_dim"]


def merge(kept: PartialAttention, evicted: PartialAttention) -> Float[Tensor, "*queries value_dim"]:
    """Return attention over both parts; it is exact if both parts are.

    ``(e^a x + e^b y) / (e^a + e^b)`` is ``x`` moved towards ``y`` by ``sigmoid(b - a)``, which cannot overflow. Where
    the evicted part has no weight, the kept output is returned bit for bit.
    """
    share = torch.sigmoid(evicted.lse.to(kept.lse.dtype) - kept.lse)
    return torch.lerp(kept.output, evicted.output.to(kept.output.dtype), share[..., None])
