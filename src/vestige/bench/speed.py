"""How fast: prefill and decode with eviction, against a DynamicCache and against an empty cache, in one run.

Machines are noisy and change their pace within seconds, so arms alternate: they decode a few tokens each, in turn, and
in another order every time, since what one leaves in the processor's caches slows the next. A decode figure is the
median over blocks of a block's mean step; a block is two settle intervals long, so that eviction is in it, and starts
from a fork of the prefilled cache. The floor is the same loop from an empty DynamicCache.
"""

import copy
import math
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from vestige import memory, policies
from vestige.bench.methods import peers
from vestige.bench.methods.conversation import Job, Outcome, TurnIds
from vestige.bench.results.provenance import collect_provenance
from vestige.budget import Budget
from vestige.cache.attach import attach
from vestige.cache.kv_cache import KVCache
from vestige.cache.prefill import prefill
from vestige.errors import InputError, VestigeError
from vestige.models.compat import cache_argument
from vestige.policies.base import Policy
from vestige.utils.timing import synchronized_time

_WARM_UP = 8
_TURN = 8
"""Tokens that an arm decodes before it is the next one's turn."""
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
    memories: tuple[str, ...] = ("none",)
    peers: tuple[str, ...] = ()
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
        named = (("--policy", self.policies), ("--budget", self.budgets), ("--memory", self.memories))
        for option, words in named:
            if not words:
                raise InputError(f"{option} is empty")
        if min(self.chunk, self.blocks, 1 if self.prefills is None else self.prefills) < 1:
            raise InputError("--chunk, --blocks and --prefills must be at least 1")
        for _ in self.arms():
            pass
        for peer in self.peers:
            peers.check(peer)

    def rounds(self, length: int) -> int:
        """Return how often each arm reads a text of this length."""
        return self.prefills or (3 if length <= LONG else 1)

    def peer_arms(self) -> Iterator[tuple[str, str]]:
        """Yield (peer, budget text) for each arm of a peer."""
        for peer in self.peers:
            yield from ((peer, budget) for budget in (self.budgets if peers.takes_budget(peer) else ("1.0",)))

    def arms(self) -> Iterator[tuple[str, str | None, str, Policy]]:
        """Yield (policy name, budget text, memory, policy) for each arm; raises as the command line would."""
        for name in self.policies:
            kept = name == "full"
            for budget, kind in product((None,) if kept else self.budgets, ("none",) if kept else self.memories):
                memory.make(kind)
                parsed = None if budget is None else Budget.parse(budget)
                yield name, budget, kind, policies.make(name, parsed, share=self.share, seed=self.seed)

    @property
    def steps(self) -> int:
        """Tokens of the longest block."""
        return max(_steps(policy) for *_, policy in self.arms())


def _steps(policy: Policy) -> int:
    """Return the tokens of a block: two settle intervals, so that eviction is in it."""
    return 2 * policy.every


@dataclass
class TimedMethod:
    """One thing to time: how to read the ids, the tokens of a block, and what came out."""

    read: Callable[[Tensor], Cache]
    steps: int
    cache: Cache | None = None
    prefill_s: float = 0.0
    decode_ms: float = 0.0


@dataclass
class TimedPeer:
    """A peer at one budget: a run of it reads, compresses and decodes, so it gives both figures at once."""

    name: str
    budget: str
    job: Job
    runs: list[Outcome] = field(default_factory=list)
    error: str | None = None

    def time(self, peer: Callable[[str], peers.Peer]) -> None:
        """Run once more, unless it failed before."""
        if self.error is None:
            try:
                self.runs.append(peer(self.name).run(self.job))
            except VestigeError as error:
                self.error = str(error)

    def median(self, figure: str) -> float:
        """Return the median of a figure over the runs but the first, which warms up if there are more."""
        return float(statistics.median(getattr(run, figure) for run in self.runs[1:] or self.runs))


def speed(
    config: SpeedConfig,
    model: PreTrainedModel,
    progress: Callable[[int, int], None] | None = None,
    *,
    name: str | None = None,
) -> list[dict[str, Any]]:
    """Time every (length, batch, policy, budget) and return a row for each. A peer that fails is a row with ``error``.

    Args:
        config: What to time.
        model: Attached for as long as this runs. If a length is beyond its positions, a model of the same architecture
            with random weights and stretched positions takes its place; its rows have ``random_weights`` true.
        progress: Called with (readings and turns done, those in all).
        name: What rows call the model.
    """
    facts = {"model": name or model.config.name_or_path, "seed": config.seed, **collect_provenance(model)}
    rows, done = [], 0
    cells = [(length, batch) for length in config.lengths for batch in config.batches]
    own, foreign = len(list(config.arms())) + 2, len(list(config.peer_arms()))
    turns = config.blocks * math.ceil(config.steps / _TURN)
    timed = sum(turns + (own + foreign) * config.rounds(length) for length, _ in cells)

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, timed)

    for length, batch in cells:
        fitting, stretched = stretch(model, length + config.steps)
        with torch.no_grad(), attach(fitting), _Peers(model, stretched) as peer:
            for row in _cell(config, fitting, length, batch, peer, advance):
                rows.append({**row, "random_weights": stretched, **facts})
    return rows


class _Peers(peers.OpenPeers):
    """Peers, but for lengths that no peer has positions for."""

    def __init__(self, model: PreTrainedModel, stretched: bool) -> None:
        super().__init__(model)
        self.stretched = stretched

    def __call__(self, name: str) -> peers.Peer:
        if self.stretched:
            raise InputError("a length beyond the model's positions is timed on random weights, which no peer has")
        return super().__call__(name)


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
    config: SpeedConfig, model: PreTrainedModel, length: int, batch: int, peer: _Peers, advance: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (1, length), generator=generator)
    ids = ids.to(model.device).expand(batch, -1)
    listed = list(config.arms())
    floor = TimedMethod(lambda _: DynamicCache(config=model.config), config.steps)
    full = TimedMethod(lambda x: _read_plain(model, x, config.chunk), config.steps)
    arms = [TimedMethod(_reader(model, policy, kind, config.chunk), _steps(policy)) for _, _, kind, policy in listed]
    foreign = [
        TimedPeer(name, budget, _peer_job(model, ids, name, budget, config.steps))
        for name, budget in config.peer_arms()
    ]
    everyone = [floor, full, *arms]
    _time_prefills(everyone, foreign, ids, config.rounds(length), peer, advance)
    _time_decodes(everyone, model, ids[:, -1:], config.blocks, advance)
    shared = {"length": length, "batch": batch, "chunk": config.chunk, "blocks": config.blocks}
    for (name, budget, kind, policy), arm in zip(listed, arms, strict=True):
        assert isinstance(arm.cache, KVCache)
        report = arm.cache.report()
        head = {**shared, "policy": name, "budget": budget or "1.0", "share": policy.share, "peer": None}
        head["memory"] = kind
        own = {
            "evict_s": report.evict_s,
            "annotate_s": report.annotate_s,
            "held": report.held,
            "kept_fraction": report.kept_fraction,
            "memory_bytes": report.memory_bytes,
            "kv_bytes": report.kv_bytes,
            "peak_kv_bytes": report.peak_kv_bytes,
            "full_kv_bytes": report.full_kv_bytes,
        }
        yield head | _ratios(arm.prefill_s, arm.decode_ms, floor, full) | own
    for other in foreign:
        head = {**shared, "policy": other.name, "budget": other.budget, "share": None, "peer": other.name}
        if other.error is not None:
            yield head | {"error": other.error}
            continue
        last = other.runs[-1]
        measured = {name: getattr(last, name) for name in ("held", "kv_bytes", "peak_kv_bytes", "full_kv_bytes")}
        timed = _ratios(other.median("prefill_s"), other.median("decode_ms"), floor, full)
        yield head | timed | {"evict_s": other.median("evict_s"), "kept_fraction": last.held / last.full} | measured


def _ratios(prefill_s: float, decode_ms: float, floor: TimedMethod, full: TimedMethod) -> dict[str, float]:
    return {
        "decode_ms": decode_ms,
        "floor_ms": floor.decode_ms,
        "full_decode_ms": full.decode_ms,
        "decode_over_floor": decode_ms / floor.decode_ms,
        "decode_speedup": full.decode_ms / decode_ms,
        "prefill_s": prefill_s,
        "full_prefill_s": full.prefill_s,
        "prefill_overhead": prefill_s / full.prefill_s,
    }


def _peer_job(model: PreTrainedModel, ids: Int[Tensor, "batch length"], name: str, budget: str, steps: int) -> Job:
    """Return the conversation that times a peer: these ids, the last of them again as a question, so many steps."""
    row = tuple(ids[0].tolist())
    turn = TurnIds(context=row, question=row[-1:], max_new_tokens=steps + 1)
    keep = peers.pairs_to_keep(name, budget, model, seen=len(row), length=len(row))
    return Job(turns=(turn,), stop=(), keep=keep, copies=len(ids))


def _reader(model: PreTrainedModel, policy: Policy, kind: str, chunk: int) -> Callable[[Tensor], Cache]:
    def read(ids: Tensor) -> Cache:
        cache = KVCache(model, policy, memory=memory.make(kind))
        prefill(model, ids, cache, chunk=chunk, length=ids.shape[1])
        return cache

    return read


def _read_plain(model: PreTrainedModel, ids: Int[Tensor, "batch length"], chunk: int) -> DynamicCache:
    """Read in chunks with nothing evicted, as a DynamicCache does."""
    cache = DynamicCache(config=model.config)
    for piece in ids.split(chunk, dim=1):
        model(input_ids=piece, **cache_argument(cache), use_cache=True, logits_to_keep=1)
    return cache


def _time_prefills(
    arms: list[TimedMethod],
    foreign: list[TimedPeer],
    ids: Tensor,
    rounds: int,
    peer: _Peers,
    advance: Callable[[], None],
) -> None:
    """Read with each arm in turn; the first round warms up if there are more. Peers decode in their turn as well."""
    seconds: list[list[float]] = [[] for _ in arms]
    for _ in range(rounds):
        for arm, taken in zip(arms, seconds, strict=True):
            arm.cache = None  # frees the last one first
            started = synchronized_time(ids.device)
            arm.cache = arm.read(ids)
            taken.append(synchronized_time(ids.device) - started)
            advance()
        for other in foreign:
            other.time(peer)
            advance()
    for arm, taken in zip(arms, seconds, strict=True):
        arm.prefill_s = statistics.median(taken[1:] or taken)


def _time_decodes(
    arms: list[TimedMethod], model: PreTrainedModel, token: Tensor, rounds: int, advance: Callable[[], None]
) -> None:
    """Time blocks of greedy steps, arms in turn, after a short warm-up of each."""
    for arm in arms:
        _Decoding(_copy(arm.cache), token, _WARM_UP).take_turn(model)
    means: list[list[float]] = [[] for _ in arms]
    orders = random.Random(0)
    for _ in range(rounds):
        block = [_Decoding(_copy(arm.cache), token, arm.steps) for arm in arms]
        while any(one.left for one in block):
            for one in orders.sample(block, len(block)):
                one.take_turn(model)
            advance()
        for arm, one, taken in zip(arms, block, means, strict=True):
            taken.append(one.seconds / arm.steps)
    for arm, taken in zip(arms, means, strict=True):
        arm.decode_ms = 1e3 * statistics.median(taken)


@dataclass
class _Decoding:
    """One arm's block: greedy steps from a cache, a turn at a time."""

    cache: Cache
    token: Int[Tensor, "batch 1"]
    left: int
    seconds: float = 0.0

    def take_turn(self, model: PreTrainedModel) -> None:
        """Decode the next few tokens, if any are left, and add the time they take."""
        steps = min(self.left, _TURN)
        started = synchronized_time(self.token.device)
        for _ in range(steps):
            logits = model(input_ids=self.token, **cache_argument(self.cache), use_cache=True).logits
            self.token = logits[:, -1:].argmax(-1)
        self.seconds += synchronized_time(self.token.device) - started
        self.left -= steps


def _copy(cache: Cache | None) -> Cache:
    return cache.fork() if isinstance(cache, KVCache) else copy.deepcopy(cache)  # type: ignore[return-value]
