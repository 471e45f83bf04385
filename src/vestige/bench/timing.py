"""Timed methods and peers: readings in turn, and decoding a few tokens in turn."""

import copy
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from vestige.bench.methods.conversation import Job, Outcome
from vestige.bench.methods.method import Method
from vestige.bench.methods.peers import Peer
from vestige.cache.kv_cache import KVCache
from vestige.errors import VestigeError
from vestige.models.compat import cache_argument
from vestige.utils.timing import synchronized_time

TURN = 8
"""Tokens that a method decodes before the next one's turn."""
_WARM_UP = 8


@dataclass
class TimedMethod:
    """A way to read the ids, the tokens of a block, and the times."""

    read: Callable[[Tensor], Cache]
    steps: int
    cache: Cache | None = None
    prefill_s: float = 0.0
    decode_ms: float = 0.0


@dataclass
class TimedPeer:
    """A peer at one budget: one run reads, compresses and decodes, so it gives all times at once."""

    method: Method
    job: Job
    runs: list[Outcome] = field(default_factory=list)
    error: str | None = None

    def time(self, open_peer: Callable[[str], Peer]) -> None:
        """Run once more, unless an earlier run failed."""
        if self.error is None:
            try:
                self.runs.append(open_peer(self.method.policy).run(self.job))
            except VestigeError as error:
                self.error = str(error)

    def median(self, figure: str) -> float:
        """Return the median of a figure over all runs but the first, which warms up if there are more."""
        return float(statistics.median(getattr(run, figure) for run in self.runs[1:] or self.runs))


def time_prefills(
    methods: Sequence[TimedMethod],
    timed_peers: Sequence[TimedPeer],
    ids: Int[Tensor, "batch length"],
    rounds: int,
    open_peer: Callable[[str], Peer],
    advance: Callable[[], None],
) -> None:
    """Read with each method in turn; the first round warms up if there are more. Peers decode in their turn as well."""
    seconds: list[list[float]] = [[] for _ in methods]
    for _ in range(rounds):
        for method, taken in zip(methods, seconds, strict=True):
            method.cache = None  # frees the last one first
            started = synchronized_time(ids.device)
            method.cache = method.read(ids)
            taken.append(synchronized_time(ids.device) - started)
            advance()
        for peer in timed_peers:
            peer.time(open_peer)
            advance()
    for method, taken in zip(methods, seconds, strict=True):
        method.prefill_s = statistics.median(taken[1:] or taken)


def time_decodes(
    methods: Sequence[TimedMethod],
    model: PreTrainedModel,
    token: Int[Tensor, "batch 1"],
    rounds: int,
    advance: Callable[[], None],
) -> None:
    """Time blocks of greedy steps, methods in turn, after a short warm-up of each."""
    for method in methods:
        _Decoding(_copy(method.cache), token, _WARM_UP).take_turn(model)
    means: list[list[float]] = [[] for _ in methods]
    rng = random.Random(0)
    for _ in range(rounds):
        blocks = [_Decoding(_copy(method.cache), token, method.steps) for method in methods]
        while any(block.left for block in blocks):
            for block in rng.sample(blocks, len(blocks)):
                block.take_turn(model)
            advance()
        for method, block, taken in zip(methods, blocks, means, strict=True):
            taken.append(block.seconds / method.steps)
    for method, taken in zip(methods, means, strict=True):
        method.decode_ms = 1e3 * statistics.median(taken)


@dataclass
class _Decoding:
    """One method's block: greedy steps from a cache, a turn at a time."""

    cache: Cache
    token: Int[Tensor, "batch 1"]
    left: int
    seconds: float = 0.0

    def take_turn(self, model: PreTrainedModel) -> None:
        """Decode the next few tokens, if any are left, and add their time."""
        steps = min(self.left, TURN)
        started = synchronized_time(self.token.device)
        for _ in range(steps):
            logits = model(input_ids=self.token, **cache_argument(self.cache), use_cache=True).logits
            self.token = logits[:, -1:].argmax(-1)
        self.seconds += synchronized_time(self.token.device) - started
        self.left -= steps


def _copy(cache: Cache | None) -> Cache:
    return cache.fork() if isinstance(cache, KVCache) else copy.deepcopy(cache)  # type: ignore[return-value]
