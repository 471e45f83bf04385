"""The benchmark of speed: prefill and decode with eviction, against a DynamicCache and an empty cache, in one run.

Machines are noisy and change their pace within seconds, so methods alternate. Each decodes a few tokens in turn. The
order changes every time, since the data that one leaves in the processor's caches slows the next. A decode figure is
the median over blocks of a block's mean step. A block is two settle intervals long, so that it has evictions, and
starts from a fork of the prefilled cache. The floor is the same loop from an empty DynamicCache.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from vestige.bench.methods import peers
from vestige.bench.methods.conversation import Job, TurnIds
from vestige.bench.methods.method import Method
from vestige.bench.results.provenance import collect_provenance
from vestige.bench.timing import TURN, TimedMethod, TimedPeer, time_decodes, time_prefills
from vestige.cache.attach import attach
from vestige.cache.kv_cache import KVCache
from vestige.cache.prefill import prefill
from vestige.errors import InputError
from vestige.models.compat import cache_argument
from vestige.policies.base import Policy

_REPORTED = (
    "evict_s", "annotate_s", "held", "kept_fraction", "memory_bytes", "kv_bytes", "peak_kv_bytes", "full_kv_bytes",
)  # fmt: skip
LONG = 16_384
"""Tokens beyond which a reading takes minutes, and the effect of a warm-up is small."""


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """The lengths, batches and methods to time.

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
    """Readings per method, the first a warm-up if there are more; None is 3, or 1 beyond ``LONG`` tokens."""
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
        self.list_methods()
        self.list_peers()

    def rounds(self, length: int) -> int:
        """Return the number of readings of a text of this length by each method."""
        return self.prefills or (3 if length <= LONG else 1)

    def list_peers(self) -> list[Method]:
        """Return each peer with each of its budgets."""
        return [
            Method(policy=peer, budget=budget, peer=peer)
            for peer in self.peers
            for budget in (self.budgets if peers.takes_budget(peer) else ("1.0",))
        ]

    def list_methods(self) -> list[Method]:
        """Return vestige's own methods; raises the errors of the command line."""
        listed = []
        for name in self.policies:
            cells = [("1.0", "none")] if name == "full" else product(self.budgets, self.memories)
            listed += [Method(policy=name, budget=budget, share=self.share, memory=kind) for budget, kind in cells]
        return listed

    @property
    def steps(self) -> int:
        """Tokens of the longest block."""
        return max(count_steps(method.make_policy(self.seed)) for method in self.list_methods())


def count_steps(policy: Policy) -> int:
    """Return the tokens of a block: two settle intervals, so that eviction is in it."""
    return 2 * policy.every


def speed(
    config: SpeedConfig,
    model: PreTrainedModel,
    progress: Callable[[int, int], None] | None = None,
    *,
    name: str | None = None,
) -> list[dict[str, Any]]:
    """Time every (length, batch, policy, budget) and return a row for each. A peer that fails is a row with ``error``.

    Args:
        config: The lengths, batches and methods.
        model: Attached for as long as this runs. If a length is beyond its positions, a model of the same architecture
            with random weights and stretched positions takes its place; its rows have ``random_weights`` true.
        progress: Called with (readings and turns done, in all).
        name: The model's name in rows.
    """
    facts = {"model": name or model.config.name_or_path, "seed": config.seed, **collect_provenance(model)}
    rows, done = [], 0
    cells = [(length, batch) for length in config.lengths for batch in config.batches]
    num_timed = 2 + len(config.list_methods()) + len(config.list_peers())
    turns = config.blocks * math.ceil(config.steps / TURN)
    timed = sum(turns + num_timed * config.rounds(length) for length, _ in cells)

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, timed)

    for length, batch in cells:
        fitting, stretched = stretch(model, length + config.steps)
        with torch.no_grad(), attach(fitting), peers.OpenPeers(model) as opened:
            for row in _time_cell(config, fitting, length, batch, _refuse if stretched else opened, advance):
                rows.append({**row, "random_weights": stretched, **facts})
    return rows


def _refuse(name: str) -> peers.Peer:
    """Raise an InputError: no peer has the positions of a stretched model."""
    raise InputError("a length beyond the model's positions is timed on random weights, which no peer has")


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


def _time_cell(
    config: SpeedConfig,
    model: PreTrainedModel,
    length: int,
    batch: int,
    open_peer: Callable[[str], peers.Peer],
    advance: Callable[[], None],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one length and batch size."""
    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (1, length), generator=generator)
    ids = ids.to(model.device).expand(batch, -1)
    listed = [(method, method.make_policy(config.seed)) for method in config.list_methods()]
    floor = TimedMethod(lambda _: DynamicCache(config=model.config), config.steps)
    full = TimedMethod(lambda x: _read_plain(model, x, config.chunk), config.steps)
    methods = [
        TimedMethod(partial(_read, model, method, policy, config.chunk), count_steps(policy))
        for method, policy in listed
    ]
    timed_peers = [
        TimedPeer(method, _make_peer_job(model, ids, method, config.steps)) for method in config.list_peers()
    ]
    time_prefills([floor, full, *methods], timed_peers, ids, config.rounds(length), open_peer, advance)
    time_decodes([floor, full, *methods], model, ids[:, -1:], config.blocks, advance)
    shared = {"length": length, "batch": batch, "chunk": config.chunk, "blocks": config.blocks}
    for (method, policy), timed in zip(listed, methods, strict=True):
        assert isinstance(timed.cache, KVCache)
        report = timed.cache.report()
        head = shared | method.key | {"share": policy.share}
        sizes = {name: getattr(report, name) for name in _REPORTED}
        yield head | _compare_times(timed.prefill_s, timed.decode_ms, floor, full) | sizes
    for peer in timed_peers:
        head = shared | {name: value for name, value in peer.method.key.items() if name != "memory"}
        if peer.error is not None:
            yield head | {"error": peer.error}
            continue
        last = peer.runs[-1]
        sizes = {name: getattr(last, name) for name in ("held", "kv_bytes", "peak_kv_bytes", "full_kv_bytes")}
        times = _compare_times(peer.median("prefill_s"), peer.median("decode_ms"), floor, full)
        yield head | times | {"evict_s": peer.median("evict_s"), "kept_fraction": last.held / last.full} | sizes


def _compare_times(prefill_s: float, decode_ms: float, floor: TimedMethod, full: TimedMethod) -> dict[str, float]:
    """Return times, and their ratios to those of the floor and the full cache."""
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


def _make_peer_job(model: PreTrainedModel, ids: Int[Tensor, "batch length"], method: Method, steps: int) -> Job:
    """Return the job that times a peer: the ids as context, the last of them again as question, and ``steps`` steps."""
    row = tuple(ids[0].tolist())
    turn = TurnIds(context=row, question=row[-1:], max_new_tokens=steps + 1)
    keep = peers.pairs_to_keep(method.policy, method.budget, model, seen=len(row), length=len(row))
    return Job(turns=(turn,), stop=(), keep=keep, copies=len(ids))


def _read(model: PreTrainedModel, method: Method, policy: Policy, chunk: int, ids: Tensor) -> KVCache:
    cache = KVCache(model, policy, memory=method.make_memory())
    prefill(model, ids, cache, chunk=chunk, length=ids.shape[1])
    return cache


def _read_plain(model: PreTrainedModel, ids: Int[Tensor, "batch length"], chunk: int) -> DynamicCache:
    """Read in chunks with nothing evicted, as a DynamicCache does."""
    cache = DynamicCache(config=model.config)
    for piece in ids.split(chunk, dim=1):
        model(input_ids=piece, **cache_argument(cache), use_cache=True, logits_to_keep=1)
    return cache
