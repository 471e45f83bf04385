"""Runs of vestige's own methods: one reading serves every policy that acts after it, on forks of its cache."""

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
    """The cache after the replay of a policy, whatever its budget, and the seconds of the replay."""

    def ready_for(self, model: PreTrainedModel, policy: Policy) -> tuple[KVCache, float]:
        """Return the cache for a policy to fork, and the seconds of its replay, which runs once for all budgets."""
        if not isinstance(policy, NeedsReplay):
            return self.cache, 0.0
        unlimited = replace(policy, budget=None, threshold=None)
        if unlimited not in self.prepared:
            cache, started = self.cache.fork(unlimited), synchronized_time(model.device)
            finish(model, cache, self.ids)
            self.prepared[unlimited] = cache, synchronized_time(model.device) - started
        return self.prepared[unlimited]


def sharing_key(policy: Policy) -> Hashable:
    """Return a key that is equal for policies that may work on forks of one reading, since none slows the others.

    Policies that observe every query, or score every token with trained weights, share only with equal observers.
    """
    return annotation_key(policy) if isinstance(policy, QueryObserver | LayerObserver | Trained) else None


def read(model: PreTrainedModel, jobs: Sequence[Job], observers: Sequence[Policy]) -> Reading:
    """Read the first contexts of jobs, a batch row each, and record what the observers, the forks' policies, need."""
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
        policy: The policy; a budget in bytes is for each job, as if it were alone.
        memory: The memory of evicted pairs.
        chunk: Tokens per forward while reading; None reads in one piece.
        reading: The reading of the first contexts; left as it is.

    Raises:
        VestigeError: The budget cannot be met, a score is broken, ...
    """
    assert len(jobs) == 1 or all(len(job.turns) == 1 for job in jobs)
    conversation = _Conversation(model, _scale_budget(policy, len(jobs)), memory, chunk or ONE_PIECE, reading)
    for t in range(len(jobs[0].turns)):
        turns = [job.turns[t] for job in jobs]
        contexts = [(*conversation.pending, *turn.context) for turn in turns]
        conversation.read(contexts, [len(turn.question) for turn in turns])
        conversation.reply([turn.question for turn in turns], [turn.max_new_tokens for turn in turns], jobs[0].stop)
    return [conversation.make_outcome(row, len(jobs)) for row in range(len(jobs))]


def _scale_budget(policy: Policy, jobs: int) -> Policy:
    """Return a policy whose budget in bytes, which batch rows share, is enough for all jobs."""
    if policy.budget is None or policy.budget.kind != "bytes":
        return policy
    return replace(policy, budget=Budget.bytes(policy.budget.amount * jobs))


class _Conversation:
    """A conversation in progress: its cache, replies and times."""

    report: Report
    """Of the cache after the last reading."""

    def __init__(
        self, model: PreTrainedModel, policy: Policy, memory: Memory | None, chunk: int, reading: Reading | None
    ) -> None:
        self.model, self.chunk, self.reading = model, chunk, reading
        self.logits = torch.empty(0)
        self.replies: list[tuple[tuple[int, ...], ...]] = []
        self.pending: tuple[int, ...] = ()
        self.prefill_s = self.evict_s = self.decode_s = 0.0
        self.steps = 0
        if reading is None:
            self.cache = KVCache(model, policy, memory=memory)
            return
        ready, self.prefill_s = reading.ready_for(model, policy)
        self.cache = ready.fork(policy, memory=memory)
        if self.prefill_s:
            self.cache.state.raise_peak(ready.state.peak_kv_bytes)

    def read(self, contexts: list[tuple[int, ...]], questions: list[int]) -> None:
        """Read and settle a turn's contexts; the announced lengths include the questions."""
        cache, reading = self.cache, None if self.replies else self.reading
        seen = cache.seen if self.replies else (0,) * len(contexts)
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
        self.report = cache.report()

    def reply(self, questions: list[tuple[int, ...]], limits: list[int], stop: tuple[int, ...]) -> None:
        """Read a turn's questions, which stay whole, and decode until every batch row has stopped."""
        cache = self.cache
        if any(questions):
            ids, mask = pad_left(questions, self.model.device)
            self.logits = prefill(self.model, ids, cache, chunk=ONE_PIECE, settle=False, attention_mask=mask)
            cache.state.schedule.allow_question(max(self.chunk, ids.shape[1]))  # a question stays whole, however long
        decoded = decode(lambda token: forward(self.model, token, cache), self.logits, limits, stop)
        self.decode_s += decoded.seconds
        self.steps += decoded.steps
        self.pending = tuple(token for token in decoded.replies[0][-1:] if token not in stop)
        self.replies.append(decoded.replies)

    def make_outcome(self, row: int, batch: int) -> Outcome:
        """Return one batch row's replies, and its even share of the bytes and pairs."""
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
