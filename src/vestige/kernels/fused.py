"""Torch's CPU attention kernel, which also returns log-sum-exps; :mod:`vestige.kernels.reference` does the rest."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

KERNEL: Callable[..., tuple[Tensor, Tensor]] | None = getattr(
    torch, "_scaled_dot_product_flash_attention_for_cpu", None
)
"""Not public in torch, so it may go: then its work is written out."""


def fuses(query: Tensor, keys: Tensor, values: Tensor, *others: Tensor) -> bool:
    """Return whether the kernel can do it: on a CPU, for keys as wide as values, where nothing asks for a gradient."""
    if KERNEL is None or query.device.type != "cpu" or keys.shape[-1] != values.shape[-1]:
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys, values, *others)))


def fused(
    query: Float[Tensor, "batch heads new head_dim"],
    keys: Float[Tensor, "batch heads held head_dim"],
    values: Float[Tensor, "batch heads held value_dim"],
    scaling: float,
    bias: Float[Tensor, "batch heads _new held"] | None = None,
) -> tuple[Float[Tensor, "batch heads new value_dim"], Float[Tensor, "batch heads new"]]:
    """Return what every query reads of every pair, and the log of what these weigh; ask :func:`fuses` first.

    Args:
        query: Queries.
        keys: Of the pairs, in the dtype of the queries.
        values: Of the pairs.
        scaling: Of the products.
        bias: Added to them.
    """
    assert KERNEL is not None, "the caller has asked"
    return KERNEL(query, keys, values, attn_mask=bias, scale=scaling)
