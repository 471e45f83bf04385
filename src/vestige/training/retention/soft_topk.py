"""A differentiable top-k: the degree to which a budget keeps each pair of a text.

Our own. Pairs above a threshold are kept, those near it in part. The threshold moves along with all pairs, so that
longer lifetimes for all of them gain nothing.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from vestige.nn.retention_gates import Gates, GatesConfig
from vestige.policies.selection import Share

SOFTNESS = 0.5
"""Distance from the threshold within which pairs are kept in part, in logarithms of lifetimes."""
_SLOWEST = -1e-9  # largest log beta; above it gradients vanish


def log_lifetimes(log_beta: Float[Tensor, "rows text"]) -> Float[Tensor, "rows text"]:
    """Return ``-log(-log beta)``: the logarithm of the tokens after which a pair's retention has fallen to 1/e."""
    return -torch.log(-log_beta.clamp_max(_SLOWEST))


def gate_log_beta(gates: Gates, states: Mapping[int, Tensor]) -> Float[Tensor, "rows text"]:
    """Return log beta of the pairs of all layers, from the hidden states that enter each, ``1 text hidden``."""
    return torch.cat([gates(layer_idx, hidden)[0] for layer_idx, hidden in sorted(states.items())])


def log_kept(log_beta: Float[Tensor, "rows text"], share: float, groups: Iterable[int]) -> Float[Tensor, "rows text"]:
    """Return the logarithm of the degree, in (0, 1), to which each pair is kept at the end of a text.

    Args:
        log_beta: Log beta of every pair.
        share: Share of a group's pairs that are kept, in (0, 1).
        groups: Number of rows in each group; the rows of a group compete. They add up to all rows.
    """
    age = torch.arange(log_beta.shape[1], 0, -1, device=log_beta.device)
    left = log_lifetimes(log_beta) - age.log()  # orders pairs as age * log beta does
    return torch.cat([_soft_threshold(group, share) for group in left.split(list(groups))])


def competing_rows(config: GatesConfig, share: Share) -> Sequence[int]:
    """Return the number of rows in each group of rows that compete."""
    if share == "model":
        return (sum(config.kv_heads),)
    return config.kv_heads if share == "layer" else (1,) * sum(config.kv_heads)


def _soft_threshold(left: Float[Tensor, "rows text"], share: float) -> Float[Tensor, "rows text"]:
    fixed = left.detach()
    limit = fixed.flatten().kthvalue(max(round((1 - share) * left.numel()), 1)).values
    near = torch.sigmoid((fixed - limit) / SOFTNESS)
    near = near * (1 - near)
    mean = (near * left).sum() / near.sum()
    return logsigmoid((left - limit - (mean - mean.detach())) / SOFTNESS)
