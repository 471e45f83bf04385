"""Order of samples and derived seeds: pure functions of seed and position, so that any step can be repeated."""

import hashlib
from functools import lru_cache

import torch


def find_sample_index(seed: int, position: int, num_samples: int | None) -> int:
    """Return the index of the sample at a position.

    Args:
        seed: Seed of the run.
        position: Number of samples before this one, over all steps and epochs.
        num_samples: Samples of an epoch, which is shuffled; None is a stream in its own order.
    """
    if num_samples is None:
        return position
    epoch, place = divmod(position, num_samples)
    return _shuffle(seed, epoch, num_samples)[place]


def derive_seed(*purpose: int | str) -> int:
    """Return a seed below 2**63 for a purpose: ``derive_seed(config.seed, "spans", index)``."""
    digest = hashlib.sha256("/".join(map(str, purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(*purpose: int | str) -> torch.Generator:
    """Return a generator on the CPU, with the seed of :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*purpose))


@lru_cache(maxsize=2)  # a step may lie across two epochs
def _shuffle(seed: int, epoch: int, num_samples: int) -> list[int]:
    generator = make_generator(seed, "epoch", epoch)
    return [int(i) for i in torch.randperm(num_samples, generator=generator)]
