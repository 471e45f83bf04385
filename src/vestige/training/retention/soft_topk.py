"""What a budget would keep of a text, softly: a top-k that gradients go through.

Our own. Pairs that are worth more than the limit are kept, near it in part; the limit moves along with them, so that to
let everything live longer gains nothing.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from vestige.nn.retention_gates import Gates, GatesConfig
from vestige.policies.selection import Share

SOFTNESS = 0.5
"""How far around the limit pairs are kept in part, in logarithms of lives."""
_SLOWEST = -1e-9  # as a log beta: beyond it gradients vanish


def log_lifetimes(log_beta: Float[Tensor, "rows text"]) -> Float[Tensor, "rows text"]:
    """Return ``-log(-log beta)``: the logarithm of the tokens over which a pair's retention falls to 1/e."""
    return -torch.log(-log_beta.clamp_max(_SLOWEST))


def gate_log_beta(gates: Gates, states: Mapping[int, Tensor]) -> Float[Tensor, "rows text"]:
    """Return log beta of the pairs that each layer makes of what enters it, ``1 text hidden``, layer by layer."""
    return torch.cat([gates(layer_idx, hidden)[0] for layer_idx, hidden in sorted(states.items())])


def log_kept(log_beta: Float[Tensor, "rows text"], share: float, groups: Iterable[int]) -> Float[Tensor, "rows text"]:
    """Return the logarithm of how far each pair is kept at the end of a text, in (0, 1).

    Args:
        log_beta: Of every pair of every row.
        share: Of the pairs of a group that are kept, in (0, 1).
        groups: Rows that compete with each other, how many together: their sum is the number of rows.
    """
    age = torch.arange(log_beta.shape[1], 0, -1, device=log_beta.device)
    left = log_lifetimes(log_beta) - age.log()  # orders pairs as age * log beta does
    return torch.cat([_over_the_limit(one, share) for one in left.split(list(groups))])


def competing_rows(config: GatesConfig, share: Share) -> Sequence[int]:
    """Return how many rows compete with each other, group by group."""
    if share == "model":
        return (sum(config.kv_heads),)
    return config.kv_heads if share == "layer" else (1,) * sum(config.kv_heads)


def _over_the_limit(left: Float[Tensor, "rows text"], share: float) -> Float[Tensor, "rows text"]:
    fixed = left.detach()
    limit = fixed.flatten().kthvalue(max(round((1 - share) * left.numel()), 1)).values
    near = torch.sigmoid((fixed - limit) / SOFTNESS)
    near = near * (1 - near)
    mean = (near * left).sum() / near.sum()
    return logsigmoid((left - limit - (mean - mean.detach())) / SOFTNESS)
