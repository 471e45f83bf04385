"""Random: uniformly sampled pairs, the control for any score."""

from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float, Int
from torch import Tensor

from vestige.errors import PolicyError
from vestige.kernels.packed import row_ids
from vestige.policies.base import Policy
from vestige.policies.observation import Observation

_MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # SplitMix64's constants, as signed integers


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Keep pairs at random, each as likely as any other, however often room is made.

    Source: the usual control. Differs from a new draw at each eviction: a pair's score is a hash of (seed, layer, KV
    head, position), fixed for its lifetime. So after many evictions the held pairs are a uniform sample of all seen
    pairs rather than mostly recent, and chunks, batches, forks and saved caches agree without any random state.
    """

    seed: int = 0
    """Seed of the sample; 32 bits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -(2**32) < self.seed < 2**32:
            raise PolicyError(f"seed must fit into 32 bits, got {self.seed!r}")

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return uniform numbers in [0, 1)."""
        lengths = [end - start for start, end in pairwise(obs.cu_seqlens)]
        heads = row_ids(lengths, obs.positions.device) % obs.kv_heads
        stream = (self.seed * 2**20 + obs.layer_idx) * 2**10 + heads
        return uniform(splitmix64(stream) + obs.positions.long())


def splitmix64(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Return the SplitMix64 hash of 64-bit integers (Steele, Lea and Flood 2014); overflow wraps."""
    x = x * _MIX[0] + _MIX[0]  # odd multiple of the golden gamma: separates neighbouring inputs
    x = (x ^ _shift(x, 30)) * _MIX[1]
    x = (x ^ _shift(x, 27)) * _MIX[2]
    return x ^ _shift(x, 31)


def uniform(seed: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return a float32 in [0, 1) for each integer: its hash's top 24 bits, which float32 holds exactly."""
    drawn: Tensor = _shift(splitmix64(seed), 40).float() / 2**24
    return drawn


def _shift(x: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    """Shift right without torch's sign extension."""
    low: int = 2 ** (64 - bits) - 1
    return (x >> bits) & low
