"""Which sample comes when: a pure function of seed, epoch and position, so that any step can be begun again."""

import hashlib
from functools import lru_cache

import torch


def find_sample_index(seed: int, position: int, num_samples: int | None) -> int:
    """Return the index of a sample.

    Args:
        seed: Of the run.
        position: Samples before this one, over all steps and epochs.
        num_samples: Of an epoch, each of which is shuffled in its own way; None is a stream, in its own order.
    """
    if num_samples is None:
        return position
    epoch, place = divmod(position, num_samples)
    return _shuffled(seed, epoch, num_samples)[place]


def derive_seed(*what: int | str) -> int:
    """Return a seed below 2**63 that follows from what it is for: ``seed_of(config.seed, "spans", index)``."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(*what: int | str) -> torch.Generator:
    """Return a generator on the CPU, seeded as :func:`derive_seed` says."""
    return torch.Generator().manual_seed(derive_seed(*what))


@lru_cache(maxsize=2)  # a step may lie across two epochs
def _shuffled(seed: int, epoch: int, num_samples: int) -> list[int]:
    generator = make_generator(seed, "epoch", epoch)
    return [int(i) for i in torch.randperm(num_samples, generator=generator)]
