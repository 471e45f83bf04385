"""Torch's CPU attention kernel, which also returns log-sum-exps; :mod:`vestige.kernels.reference` does the rest."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

KERNEL: Callable[..., tuple[Tensor, Tensor]] | None = getattr(
    torch, "_scaled_dot_product_flash_attention_for_cpu", None
)
"""None where torch has removed it, since it is not public; then the reference computes the formula itself."""


def can_fuse(query: Tensor, keys: Tensor, values: Tensor, *further: Tensor) -> bool:
    """Return whether the kernel applies: on a CPU, for keys as wide as values, where no gradient is needed."""
    if KERNEL is None or query.device.type != "cpu" or keys.shape[-1] != values.shape[-1]:
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys, values, *further)))


def fused(
    query: Float[Tensor, "batch heads new head_dim"],
    keys: Float[Tensor, "batch heads held head_dim"],
    values: Float[Tensor, "batch heads held value_dim"],
    scaling: float,
    bias: Float[Tensor, "batch heads _new held"] | None = None,
) -> tuple[Float[Tensor, "batch heads new value_dim"], Float[Tensor, "batch heads new"]]:
    """Return the attention output of every query, and its log-sum-exp; requires :func:`can_fuse`.

    Keys have the dtype of the queries; ``bias`` is added to the products after ``scaling``.
    """
    assert KERNEL is not None, "the caller has checked"
    return KERNEL(query, keys, values, attn_mask=bias, scale=scaling)
