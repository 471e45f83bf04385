"""Attention over ragged rows: a readable reference, and faster kernels that are checked against it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class AttentionScale:
    """The steps from query-key products to attention in one layer; a score repeats them to agree with the model.

    Args:
        scaling: Factor on the products.
        softcap: Bound of the products, ``softcap * tanh(x / softcap)``, or None.
        sinks: Learned logit per query head that takes part in the softmax (gpt_oss), or None.
    """

    scaling: float
    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None

    def of_group(self, kv_head: int, kv_heads: int) -> "AttentionScale":
        """Return the scale of the query heads that read one KV head."""
        if self.sinks is None:
            return self
        return AttentionScale(self.scaling, self.softcap, self.sinks.chunk(kv_heads)[kv_head])

    def capped(self, logits: Tensor) -> Tensor:
        """Return scaled query-key products with the softcap applied, if there is one."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
