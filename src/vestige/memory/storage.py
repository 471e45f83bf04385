"""Storage of averages in few bytes: `encode` and `decode`, with one scale per row."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.errors import PolicyError, unknown_name_message
from vestige.memory.base import State

Dtype = Literal["float16", "float32"]
DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}
"""Storage dtypes of averages; arithmetic is in float32 either way."""


def update_means(
    means: Float[Tensor, "rows groups dim"],
    sums: Float[Tensor, "rows groups dim"],
    added: Float[Tensor, "rows groups"],
    total: Float[Tensor, "rows groups"],
) -> Float[Tensor, "rows groups dim"]:
    """Return means after an addition or a removal; means of unchanged groups stay bit for bit.

    ``sums`` and ``added`` are the weighted sum and the weight of the added members, negative for removed ones;
    ``total`` is the weight of each group afterwards.
    """
    tiny = torch.finfo(total.dtype).tiny
    return means + (sums - added[..., None] * means) / total.clamp_min(tiny)[..., None]


def check_dtype(name: str) -> None:
    """Raise a PolicyError unless the name is one of ``DTYPES``."""
    if name not in DTYPES:
        raise PolicyError(unknown_name_message("dtype", str(name), DTYPES))


def encode(name: str, exact: Tensor, dtype: Dtype) -> dict[str, Tensor]:
    """Return a ``rows ...`` tensor as two entries of a state: in a narrow dtype, and a float32 factor for each row.

    The largest entry of a row becomes 1, so that float16, with its maximum of 65504, cannot overflow: products of keys
    and values with outlier channels can be larger.
    """
    largest = exact.abs().amax(tuple(range(1, exact.ndim)), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return {name: (exact / largest).to(DTYPES[dtype]), f"{name}_scale": largest}


def decode(state: State, name: str) -> Tensor:
    """Return in float32 a tensor that :func:`encode` put into a state."""
    return state[name] * state[f"{name}_scale"]  # widened on the way: one pass
