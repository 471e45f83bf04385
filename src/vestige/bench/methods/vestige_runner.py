"""Running our own arms: one reading serves every policy that acts after it, on forks of its cache."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vestige import policies
from vestige.bench.methods.conversation import Job, Outcome
from vestige.bench.methods.decode import decode
from vestige.budget import Budget
from vestige.cache.kv_cache import KVCache
from vestige.cache.prefill import finish, prefill
from vestige.cache.recording import annotation_key
from vestige.cache.report import Report
from vestige.memory.base import Memory
from vestige.models.forward import forward, pad_left
from vestige.nn.pretrained import Trained
from vestige.policies.base import LayerObserver, NeedsReplay, Policy, QueryObserver
from vestige.utils.timing import synchronized_time

ONE_PIECE = 2**20


@dataclass(frozen=True)
class Reading:
    """The first contexts of a batch of jobs, read once with nothing evicted."""

    cache: KVCache
    ids: Int[Tensor, "batch width"]
    logits: Float[Tensor, "batch vocab"]
    seconds: float
    prepared: dict[Policy, tuple[KVCache, float]] = field(default_factory=dict)
    """What policies that prepare left, whatever their budget, and the seconds it took."""

    def ready_for(self, model: PreTrainedModel, policy: Policy) -> tuple[KVCache, float]:
        """Return the cache that a policy forks, and the seconds of its own forwards, which run once for all budgets."""
        if not isinstance(policy, NeedsReplay):
            return self.cache, 0.0
        unlimited = replace(policy, budget=None, threshold=None)
        if unlimited not in self.prepared:
            cache, started = self.cache.fork(unlimited), synchronized_time(model.device)
            finish(model, cache, self.ids)
            self.prepared[unlimited] = cache, synchronized_time(model.device) - started
        return self.prepared[unlimited]


def company(policy: Policy) -> Hashable:
    """Return what policies have in common that may work on forks of one reading: none slows the others down.

    Those that look at every query, or at every token with trained weights, are alone with those that do the same.
    """
    return annotation_key(policy) if isinstance(policy, QueryObserver | LayerObserver | Trained) else None


def read(model: PreTrainedModel, jobs: Sequence[Job], observers: Sequence[Policy]) -> Reading:
    """Read the first contexts of jobs in one piece, recording what the policies will need.

    Args:
        model: An attached model.
        jobs: One batch row each.
        observers: Policies that forks will have.
    """
    cache = KVCache(model, policies.Full(), observers=observers)
    ids, mask = pad_left([job.turns[0].context for job in jobs], model.device)
    started = synchronized_time(model.device)
    logits = prefill(model, ids, cache, chunk=ONE_PIECE, attention_mask=mask)
    return Reading(cache, ids, logits, synchronized_time(model.device) - started)


def run(
    model: PreTrainedModel,
    jobs: Sequence[Job],
    policy: Policy,
    *,
    memory: Memory | None = None,
    chunk: int | None = None,
    reading: Reading | None = None,
) -> list[Outcome]:
    """Run a batch of conversations under one policy.

    Args:
        model: An attached model.
        jobs: One batch row each; several only if each has one turn.
        policy: What to keep of each job; a budget in bytes is one of each, as if it were alone.
        memory: What remains of the evicted.
        chunk: Tokens per forward while reading; None reads in one piece.
        reading: The first contexts, read already; left as it is.

    Raises:
        VestigeError: The budget cannot be met, a score is broken, ...
    """
    assert len(jobs) == 1 or all(len(job.turns) == 1 for job in jobs)
    talk = _Talk(model, _for_each(policy, len(jobs)), memory, chunk or ONE_PIECE)
    for t in range(len(jobs[0].turns)):
        turns = [job.turns[t] for job in jobs]
        contexts = [(*talk.pending, *turn.context) for turn in turns]
        talk.read(contexts, [len(turn.question) for turn in turns], reading if t == 0 else None)
        talk.reply([turn.question for turn in turns], [turn.max_new_tokens for turn in turns], jobs[0].stop)
    return [talk.outcome(row, len(jobs)) for row in range(len(jobs))]


def _for_each(policy: Policy, jobs: int) -> Policy:
    """Return a policy whose budget in bytes, which batch rows share, is that of so many jobs together."""
    if policy.budget is None or policy.budget.kind != "bytes":
        return policy
    return replace(policy, budget=Budget.bytes(policy.budget.amount * jobs))


class _Talk:
    """A conversation under way: the cache and what it took so far."""

    def __init__(self, model: PreTrainedModel, policy: Policy, memory: Memory | None, chunk: int) -> None:
        self.model, self.policy, self.memory, self.chunk = model, policy, memory, chunk
        self.cache: KVCache | None = None
        self.report: Report | None = None
        self.logits = torch.empty(0)
        self.replies: list[tuple[tuple[int, ...], ...]] = []
        self.pending: tuple[int, ...] = ()
        self.prefill_s = self.evict_s = self.decode_s = 0.0
        self.steps = 0

    def read(self, contexts: list[tuple[int, ...]], questions: list[int], reading: Reading | None) -> None:
        """Read and settle a turn's contexts, announced as so long as they and their questions are."""
        cache = self.cache or self._begin(reading)
        seen = (0,) * len(contexts) if self.cache is None else cache.seen
        lengths = [s + len(c) + q for s, c, q in zip(seen, contexts, questions, strict=True)]
        evicted, started = cache.state.evict_s, synchronized_time(self.model.device)
        if reading is not None:
            self.prefill_s += reading.seconds
            cache.state.announce(lengths, len(contexts))
            finish(self.model, cache, reading.ids)
            self.logits = reading.logits
        else:
            ids, mask = pad_left(contexts, self.model.device)
            self.logits = prefill(self.model, ids, cache, chunk=self.chunk, length=lengths, attention_mask=mask)
        self.prefill_s += synchronized_time(self.model.device) - started
        self.evict_s += cache.state.evict_s - evicted
        self.cache, self.report = cache, cache.report()

    def _begin(self, reading: Reading | None) -> KVCache:
        if reading is None:
            return KVCache(self.model, self.policy, memory=self.memory)
        ready, seconds = reading.ready_for(self.model, self.policy)
        cache = ready.fork(self.policy, memory=self.memory)
        if seconds:
            cache.state.raise_peak(ready.state.peak_kv_bytes)
        self.prefill_s += seconds
        return cache

    def reply(self, questions: list[tuple[int, ...]], limits: list[int], stop: tuple[int, ...]) -> None:
        """Read a turn's questions, which stay whole, and decode until every batch row has stopped."""
        assert self.cache is not None
        cache = self.cache
        if any(questions):
            ids, mask = pad_left(questions, self.model.device)
            self.logits = prefill(self.model, ids, cache, chunk=ONE_PIECE, settle=False, attention_mask=mask)
            cache.state.schedule.allow_question(max(self.chunk, ids.shape[1]))  # a question stays whole, however long
        said = decode(lambda token: forward(self.model, token, cache), self.logits, limits, stop)
        self.decode_s += said.seconds
        self.steps += said.steps
        self.pending = tuple(x for x in said.replies[0][-1:] if x not in stop)
        self.replies.append(said.replies)

    def outcome(self, row: int, batch: int) -> Outcome:
        """Return one batch row's replies, and its even share of the bytes and pairs."""
        assert self.report is not None and self.cache is not None
        report, heads = self.report, [len(layer.rows) // batch for layer in self.report.layers]
        kept = tuple(layer.rows[row * n : (row + 1) * n] for layer, n in zip(self.report.layers, heads, strict=True))
        return Outcome(
            replies=tuple(turn[row] for turn in self.replies),
            seen=report.seen[row],
            held=sum(map(sum, kept)),
            full=report.seen[row] * sum(heads),
            kv_bytes=report.kv_bytes // batch,
            peak_kv_bytes=self.cache.report().peak_kv_bytes // batch,
            full_kv_bytes=report.full_kv_bytes // batch,
            memory_bytes=report.memory_bytes // batch,
            prefill_s=self.prefill_s,
            evict_s=self.evict_s,
            decode_ms=1e3 * self.decode_s / self.steps if self.steps else None,
            kept=kept,
        )
