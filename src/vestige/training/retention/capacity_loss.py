"""The number of pairs that gates would keep at each moment of a text, and the loss for keeping too many.

Source: DBTrimKV, arXiv 2605.09649, its global form: one limit over all layers and heads.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 64
"""Moments computed together: the matrix of all moments and pairs never exists at once."""


def expected_kept(
    log_beta: Float[Tensor, "rows tokens"], starts: Int[Tensor, " tokens"], at: Int[Tensor, " moments"]
) -> Float[Tensor, " moments"]:
    """Return the sum over rows and pairs i of ``beta_i^(t-i)`` at moments t: the expected number of kept pairs.

    Gradients reach ``log_beta``. The backward pass recomputes the blocks.

    Args:
        log_beta: Log beta of every pair, for the rows of all layers.
        starts: Position at which the document of each token begins; pairs of other documents do not count.
        at: Moments, ascending.
    """
    blocks = [
        checkpoint(_kept_at, log_beta[:, : int(block[-1]) + 1], starts[block], block, use_reentrant=False)
        for block in at.split(BLOCK)
    ]
    return torch.cat(blocks)


def over_capacity(
    kept: Float[Tensor, " moments"], seen: Int[Tensor, " moments"], rows: int, capacity: Float[Tensor, " moments"]
) -> Float[Tensor, ""]:
    """Return the excess over the capacity as a share of the largest possible excess, averaged where there is any.

    Args:
        kept: From :func:`expected_kept`.
        seen: Tokens of the document up to each moment, itself included.
        rows: Number of rows of all layers.
        capacity: Pairs that a row may keep at each moment, on average.
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
