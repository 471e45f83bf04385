"""KNorm: keys of small norm."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.policies.base import Policy
from vestige.policies.observation import Observation
from vestige.policies.selection import Scale


@dataclass(frozen=True, kw_only=True)
class KNorm(Policy):
    """Keep the pairs whose keys have the smallest L2 norm: small keys tend to draw attention.

    Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430.
    Differs: sink and window are protected here; the paper spares its first two layers instead.
    """

    scale: Scale = "signed"

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return the negative norm of each key."""
        norms: Tensor = torch.linalg.vector_norm(obs.keys.float(), dim=-1)
        return -norms
