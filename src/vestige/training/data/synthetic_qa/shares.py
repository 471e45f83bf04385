"""How much of a text is kept in training."""

import math

import torch

LEAST, MOST = 0.02, 0.4


def drawn_share() -> float:
    """Return a share of the pairs to keep, drawn evenly by its logarithm from torch's global random numbers."""
    return LEAST * math.exp(float(torch.rand(())) * math.log(MOST / LEAST))
