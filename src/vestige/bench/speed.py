"""How fast: prefill and decode with eviction, against a DynamicCache and against an empty cache, in one run.

Machines are noisy, so arms alternate: every round times one block of each. A decode figure is the median over blocks
of a block's mean step; a block is two settle intervals long, so that eviction is in it, and starts from a fork of the
prefilled cache. The floor is the same loop from an empty DynamicCache.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from vestige import policies
from vestige.attachment import attach
from vestige.budget import Budget
from vestige.cache import KVCache
from vestige.errors import InputError
from vestige.policy import Policy
from vestige.reading import prefill

_WARM_UP = 8
LONG = 16_384
"""Tokens beyond which a reading takes minutes, and warming up is a small part of it."""


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """What to time.

    Raises:
        InputError: A number is out of range.
    """

    lengths: tuple[int, ...] = (8000,)
    batches: tuple[int, ...] = (1,)
    policies: tuple[str, ...] = ("snapkv",)
    budgets: tuple[str, ...] = ("0.05",)
    share: str | None = None
    chunk: int = 1024
    blocks: int = 5
    prefills: int | None = None
    """Readings per arm, the first a warm-up if there are more; None is 3, or 1 beyond ``LONG`` tokens."""
    seed: int = 0

    def __post_init__(self) -> None:
        for option, numbers in (("--length", self.lengths), ("--batch", self.batches)):
            if not numbers or min(numbers) < 1:
                raise InputError(f"{option} must be positive whole numbers, got {numbers}")
        for option, words in (("--policy", self.policies), ("--budget", self.budgets)):
            if not words:
                raise InputError(f"{option} is empty")
        if min(self.chunk, self.blocks, 1 if self.prefills is None else self.prefills) < 1:
            raise InputError("--chunk, --blocks and --prefills must be at least 1")
        for _ in self.arms():
            pass

    def rounds(self, length: int) -> int:
        """Return how often each arm reads a text of this length."""
        return self.prefills or (3 if length <= LONG else 1)

    def arms(self) -> Iterator[tuple[str, str | None, Policy]]:
        """Yield (policy name, budget text, policy) for each arm; raises as the command line would."""
        for name in self.policies:
            for budget in (None,) if name == "full" else self.budgets:
                parsed = None if budget is None else Budget.parse(budget)
                yield name, budget, policies.make(name, parsed, share=self.share, seed=self.seed)


@dataclass
class Arm:
    """One thing to time: how to read the ids, and what came out."""

    read: Callable[[Tensor], Cache]
    every: int
    cache: Cache | None = None
    prefill_s: float = 0.0
    decode_ms: float = 0.0


def speed(
    config: SpeedConfig, model: PreTrainedModel, progress: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Time every (length, batch, policy, budget) and return a row for each.

    Args:
        config: What to time.
        model: Attached for as long as this runs. If a length is beyond its positions, a model of the same architecture
            with random weights and stretched positions takes its place; its rows have ``random_weights`` true.
        progress: Called with (blocks done, blocks in all).
    """
    rows, done = [], 0
    cells = [(length, batch) for length in config.lengths for batch in config.batches]
    timed = (len(list(config.arms())) + 2) * sum(config.blocks + config.rounds(length) for length, _ in cells)

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, timed)

    for length, batch in cells:
        fitting, stretched = stretch(model, length + 2 * max(policy.every for _, _, policy in config.arms()))
        with torch.no_grad(), attach(fitting):
            for row in _cell(config, fitting, length, batch, advance):
                rows.append({**row, "random_weights": stretched})
    return rows


def stretch(model: PreTrainedModel, length: int) -> tuple[PreTrainedModel, bool]:
    """Return a model with at least ``length`` positions: the given one, or its architecture with random weights."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    if (getattr(text, "max_position_embeddings", None) or length) >= length:
        return model, False
    text.max_position_embeddings = length
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stretched = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    return stretched.to(model.device).eval(), True


def _cell(
    config: SpeedConfig, model: PreTrainedModel, length: int, batch: int, advance: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (batch, length), generator=generator)
    ids = ids.to(model.device)
    listed = list(config.arms())
    every = max(policy.every for _, _, policy in listed)
    floor = Arm(lambda _: DynamicCache(config=model.config), every)
    full = Arm(lambda x: _read_plain(model, x, config.chunk), every)
    arms = [Arm(_reader(model, policy, config.chunk), policy.every) for _, _, policy in listed]
    everyone = [floor, full, *arms]
    _time_prefills(everyone, ids, config.rounds(length), advance)
    _time_decodes(everyone, model, ids[:, -1:], config.blocks, advance)
    for (name, budget, policy), arm in zip(listed, arms, strict=True):
        assert isinstance(arm.cache, KVCache)
        report = arm.cache.report()
        yield {
            "length": length,
            "batch": batch,
            "policy": name,
            "budget": budget or "1.0",
            "share": policy.share,
            "decode_ms": arm.decode_ms,
            "floor_ms": floor.decode_ms,
            "full_decode_ms": full.decode_ms,
            "decode_over_floor": arm.decode_ms / floor.decode_ms,
            "decode_speedup": full.decode_ms / arm.decode_ms,
            "prefill_s": arm.prefill_s,
            "full_prefill_s": full.prefill_s,
            "prefill_overhead": arm.prefill_s / full.prefill_s,
            "evict_s": report.evict_s,
            "held": report.held,
            "kept_fraction": report.kept_fraction,
            "kv_bytes": report.kv_bytes,
            "peak_kv_bytes": report.peak_kv_bytes,
            "full_kv_bytes": report.full_kv_bytes,
            "chunk": config.chunk,
            "blocks": config.blocks,
        }


def _reader(model: PreTrainedModel, policy: Policy, chunk: int) -> Callable[[Tensor], Cache]:
    def read(ids: Tensor) -> Cache:
        cache = KVCache(model, policy)
        prefill(model, ids, cache, chunk=chunk, length=ids.shape[1])
        return cache

    return read


def _read_plain(model: PreTrainedModel, ids: Int[Tensor, "batch length"], chunk: int) -> DynamicCache:
    """Read in chunks with nothing evicted, as a DynamicCache does."""
    cache = DynamicCache(config=model.config)
    for piece in ids.split(chunk, dim=1):
        model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _time_prefills(arms: list[Arm], ids: Tensor, rounds: int, advance: Callable[[], None]) -> None:
    """Read with each arm in turn; the first round warms up if there are more."""
    seconds: list[list[float]] = [[] for _ in arms]
    for _ in range(rounds):
        for arm, taken in zip(arms, seconds, strict=True):
            arm.cache = None  # frees the last one first
            started = _now()
            arm.cache = arm.read(ids)
            taken.append(_now() - started)
            advance()
    for arm, taken in zip(arms, seconds, strict=True):
        arm.prefill_s = statistics.median(taken[1:] or taken)


def _time_decodes(
    arms: list[Arm], model: PreTrainedModel, token: Tensor, rounds: int, advance: Callable[[], None]
) -> None:
    """Time blocks of greedy steps, arms in turn, after a short warm-up of each."""
    for arm in arms:
        _decode(model, _copy(arm.cache), token, _WARM_UP)
    means: list[list[float]] = [[] for _ in arms]
    for _ in range(rounds):
        for arm, taken in zip(arms, means, strict=True):
            cache, steps = _copy(arm.cache), 2 * arm.every
            taken.append(_decode(model, cache, token, steps) / steps)
            advance()
    for arm, taken in zip(arms, means, strict=True):
        arm.decode_ms = 1e3 * statistics.median(taken)


def _decode(model: PreTrainedModel, cache: Cache, token: Int[Tensor, "batch 1"], steps: int) -> float:
    started = _now()
    for _ in range(steps):
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
    return _now() - started


def _copy(cache: Cache | None) -> Cache:
    return cache.fork() if isinstance(cache, KVCache) else copy.deepcopy(cache)  # type: ignore[return-value]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
