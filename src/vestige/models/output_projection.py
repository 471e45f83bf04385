"""Norms of values after the output projection, ``v W_O``, by query head."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class OutputProjection:
    """The output projection of one attention module, cut by query head; nothing is copied before a norm is needed."""

    weight: Float[Tensor, "heads value_dim hidden"]

    @cached_property
    def gram(self) -> Float[Tensor, "heads value_dim value_dim"]:
        """``W_O W_O^T`` of each query head, in float32: ``||v W_O||^2 = v gram v``, far cheaper than the product."""
        weight = self.weight.detach().float()
        return weight @ weight.transpose(1, 2)

    def norms(
        self, values: Float[Tensor, "batch kv_heads new value_dim"]
    ) -> Float[Tensor, "batch kv_heads new queries_per_kv"]:
        """Return the L2 norm of each value after the projection, by the query heads that read it."""
        grouped = self.gram.unflatten(0, (values.shape[1], -1))
        values = values.detach().float()[:, :, None]
        squares: Tensor = (values @ grouped * values).sum(-1)  # (batch, kv_heads, queries_per_kv, new)
        return squares.clamp_min(0).sqrt().transpose(2, 3)  # rounding can leave a tiny negative square

    def absolute_norms(
        self, values: Float[Tensor, "batch kv_heads new value_dim"]
    ) -> Float[Tensor, "batch kv_heads new queries_per_kv"]:
        """Return the L1 norm of each value after the projection, by the query heads that read it.

        Head by head: the projected values of all heads at once would be as large as the model's hidden states times
        its query heads.
        """
        kv_heads = values.shape[1]
        grouped = self.weight.detach().unflatten(0, (kv_heads, -1))
        found = [
            torch.stack([(values[:, k].detach() @ w).float().abs().sum(-1) for w in grouped[k]], -1)
            for k in range(kv_heads)
        ]
        return torch.stack(found, 1)
