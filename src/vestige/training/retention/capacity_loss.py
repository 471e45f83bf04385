"""How many pairs gates would keep, at each moment of a text, and the price of keeping too many.

Source: DBTrimKV, arXiv 2605.09649, its global form: one limit over all layers and heads.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 64
"""Moments that are looked at together: a matrix of all moments and all pairs never exists."""


def expected_kept(
    log_beta: Float[Tensor, "rows tokens"], starts: Int[Tensor, " tokens"], at: Int[Tensor, " moments"]
) -> Float[Tensor, " moments"]:
    """Return the sum over rows and pairs i of ``beta_i^(t-i)``, for moments t: pairs kept, if each lived by chance.

    Gradients reach ``log_beta``. Blocks are computed again for the backward pass rather than kept.

    Args:
        log_beta: Of every pair of every row of all layers.
        starts: Where the document of each token begins: others are not seen.
        at: Moments to look at, ascending.
    """
    blocks = [
        checkpoint(_kept_at, log_beta[:, : int(some[-1]) + 1], starts[some], some, use_reentrant=False)
        for some in at.split(BLOCK)
    ]
    return torch.cat(blocks)


def over_capacity(
    kept: Float[Tensor, " moments"], seen: Int[Tensor, " moments"], rows: int, capacity: Float[Tensor, " moments"]
) -> Float[Tensor, ""]:
    """Return by how much the limit is exceeded: a share of all that could exceed it, the mean where it is exceeded.

    Args:
        kept: From :func:`expected_kept`.
        seen: Tokens of the document up to each moment, itself included.
        rows: Of all layers.
        capacity: Pairs that a row may keep then, on average.
    """
    excess = (kept - capacity * rows).clamp_min(0) / (seen * rows - capacity * rows).clamp_min(1)
    return excess.sum() / (excess > 0).sum().clamp_min(1)


def _kept_at(
    log_beta: Float[Tensor, "rows pairs"], starts: Int[Tensor, " some"], at: Int[Tensor, " some"]
) -> Float[Tensor, " some"]:
    pairs = torch.arange(log_beta.shape[1], device=log_beta.device)
    age = at[:, None] - pairs
    seen = (age >= 0) & (pairs >= starts[:, None])
    left = torch.exp(age.clamp_min(0) * log_beta[:, None, :])  # (rows, some, pairs)
    return (left * seen).sum((0, 2))
