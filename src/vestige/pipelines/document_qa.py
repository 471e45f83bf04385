"""Answer questions about a long text that is read within a budget, and save the compressed cache."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige import memory as memories
from vestige import policies
from vestige.budget import Budget
from vestige.cache.attach import attach
from vestige.cache.kv_cache import KVCache
from vestige.cache.prefill import prefill
from vestige.cache.report import Report
from vestige.errors import InputError
from vestige.pipelines.answer import Answer, answer, require_room_for_reply
from vestige.pipelines.explain import Explanation, explain
from vestige.policies.base import Policy
from vestige.spans import Span
from vestige.text import locate
from vestige.text.chat_template import ChatTemplate
from vestige.text.files import read_text, require_text
from vestige.utils.files import require_new

_REPORTED = ("held", "kept_fraction", "kv_bytes", "peak_kv_bytes", "full_kv_bytes", "other_kv_bytes", "memory_bytes")
"""Figures of the cache's report that a row has, by name."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A text, questions about it, and a budget. Exactly one of ``context``, ``prompt`` and ``cache`` is given.

    Raises:
        InputError: Too few or too many sources, no question, or a number out of range.
        PolicyError: An unknown policy, share or memory, or a budget missing or refused.
        BudgetError: The budget cannot be read or is below the protected pairs.
    """

    questions: tuple[str, ...]
    context: Path | None = None
    prompt: str | None = None
    cache: Path | None = None
    policy: str = "full"
    budget: str | None = None
    share: str | None = None
    memory: str = "none"
    chunk: int = 1024
    max_new_tokens: int = 64
    save: Path | None = None
    explain: tuple[str, ...] = ()
    """Passages of the text that hold the evidence for the answers."""
    seed: int = 0

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.context, self.prompt, self.cache)) != 1:
            raise InputError("give exactly one of --context FILE and --prompt TEXT (of `run`, or --cache DIR)")
        if not self.questions and self.save is None:
            raise InputError("give at least one --question (or, to `run`, --save DIR to keep the reading)")
        for question in self.questions:
            require_text(question, "--question")
        if self.explain and (self.cache is not None or not self.questions):
            raise InputError("--explain needs a text to read (--context or --prompt) and a --question")
        if self.explain and self.memory != "none":
            raise InputError("--explain counts attention to pairs, not to what a memory holds: leave --memory out")
        for name in ("chunk", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        memories.make(self.memory)
        if self.cache is not None and (self.budget or self.share or self.policy != "full" or self.memory != "none"):
            raise InputError(
                "a saved cache brings its policy and budget along, and its memory; leave --policy, --budget, --share "
                "and --memory out"
            )
        if self.save is not None:
            require_new(self.save, " for --save")
        self.make_policy()

    def make_policy(self) -> Policy:
        """Return the policy that the options describe."""
        budget = None if self.budget is None else Budget.parse(self.budget)
        return policies.make(self.policy, budget, share=self.share, seed=self.seed)

    def text(self) -> str | None:
        """Return the text to read, or None if a saved cache takes its place."""
        if self.cache is not None:
            return None
        if self.prompt is not None:
            return require_text(self.prompt, "--prompt")
        assert self.context is not None, "checked when the config was made"
        return read_text(self.context)


@dataclass(frozen=True)
class Explained:
    """The change of a question's attention to its evidence by eviction."""

    answer: str
    """The reply with all pairs; attention was measured on the question followed by this reply."""
    explanation: Explanation

    def as_dict(self) -> dict[str, Any]:
        """Return the entry that ``--json`` prints."""
        return {"full_answer": self.answer} | self.explanation.as_dict()


@dataclass(frozen=True)
class RunResult:
    """Answers, and the report of the cache after the last settle before the first question."""

    answers: tuple[Answer, ...]
    report: Report
    prefill_s: float
    budget: Budget | None
    policy: str
    """Name of the policy; a saved cache brings it along."""
    memory: str = "none"
    """Name of the memory; a saved cache brings it along."""
    explained: tuple[Explained, ...] = ()
    """One for each question, if passages with the evidence were named."""

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens per second over all answers."""
        seconds = sum(answer.decode_s for answer in self.answers)
        return sum(answer.tokens for answer in self.answers) / seconds if seconds else 0.0

    def as_dict(self, model: str, chunk: int) -> dict[str, Any]:
        """Return the row that ``--json`` prints."""
        report, texts = self.report, [answer.text for answer in self.answers]
        return {
            "answer": texts[0] if texts else "",
            "answers": texts,
            "seen": report.seen[0],
            **{name: getattr(report, name) for name in _REPORTED},
            "prefill_s": self.prefill_s,
            "evict_s": report.evict_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "policy": self.policy,
            "share": report.share,
            "memory": self.memory,
            "budget": None if self.budget is None else str(self.budget),
            "budget_total": report.budget_total,
            "chunk": chunk,
            "model": model,
        } | ({"explain": [explained.as_dict() for explained in self.explained]} if self.explained else {})


def run(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[int, int], None] | None = None,
) -> RunResult:
    """Read a text, answer questions, and save the cache if wanted.

    Args:
        config: Text, questions and budget.
        model: The model; attached for as long as this runs.
        tokenizer: Tokenizer of the model.
        progress: Called with (tokens read, tokens in all).

    Raises:
        VestigeError: Any subclass; no file is left half written.
    """
    template = ChatTemplate(tokenizer)
    questions = [template.question(question) for question in config.questions]
    text = config.text()
    spans = [] if text is None else [locate.find(text, part, template.offsets(text)) for part in config.explain]
    with torch.no_grad(), attach(model):
        started = time.perf_counter()
        if config.cache is not None:
            cache = KVCache.load(config.cache, model)
            _check_positions(cache, max(cache.seen, default=0), questions)
        else:
            assert text is not None
            cache = read(config, model, template.context(text), questions, progress)
        prefill_s = 0.0 if text is None else time.perf_counter() - started
        if config.save is not None:
            cache.save(config.save)
        explained = _explain(config, model, tokenizer, cache, questions, spans) if spans else ()
        return replace(ask(config, model, tokenizer, cache, questions, prefill_s), explained=explained)


def ask(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: KVCache,
    questions: Sequence[Int[Tensor, "1 _question"]],
    prefill_s: float,
) -> RunResult:
    """Answer each question from the cache as it is; the last answer changes it.

    Args:
        config: Gives the longest answer.
        model: An attached model.
        tokenizer: Tokenizer of the model.
        cache: Holds the text.
        questions: Ids of each question, which follow the text.
        prefill_s: Seconds of reading, for the result.
    """
    report = cache.report()
    answers, peak = [], report.peak_kv_bytes
    for i, question in enumerate(questions):
        own = cache if i == len(questions) - 1 else cache.fork()
        answers.append(answer(model, tokenizer, own, question, max_new_tokens=config.max_new_tokens))
        peak = max(peak, own.report().peak_kv_bytes)
    return RunResult(
        tuple(answers),
        replace(report, peak_kv_bytes=peak),
        prefill_s,
        cache.policy.budget,
        policies.name_of(cache.policy),
        memories.name_of(cache.memory),
    )


def read(
    config: RunConfig,
    model: PreTrainedModel,
    ids: Int[Tensor, "1 context"],
    questions: list[Tensor],
    progress: Callable[[int, int], None] | None,
) -> KVCache:
    """Read the ids of a text into a new cache, within the config's budget.

    Args:
        config: Policy, budget, memory and chunk.
        model: An attached model.
        ids: Ids of the text.
        questions: Ids of the questions to come; the longest one is part of the announced length.
        progress: Called with (tokens read, tokens in all).
    """
    cache = KVCache(model, config.make_policy(), memory=memories.make(config.memory))
    length = _check_positions(cache, ids.shape[1], questions)
    on_read = None if progress is None else lambda count: progress(count, ids.shape[1])
    prefill(model, ids.to(model.device), cache, chunk=config.chunk, length=length, progress=on_read)
    return cache


def _explain(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: KVCache,
    questions: list[Tensor],
    spans: Sequence[Span],
) -> tuple[Explained, ...]:
    """Read the text again with all pairs, and compare the attention of each question and its reply."""
    whole = replace(config, policy="full", budget=None, share=None, memory="none")
    full = read(whole, model, cache.ids, questions, None)
    explained = list[Explained]()
    for question in questions:
        reply = answer(model, tokenizer, full.fork(), question, max_new_tokens=config.max_new_tokens)
        fed = torch.cat([question, torch.tensor([reply.ids[:-1]], dtype=question.dtype)], 1)
        explained.append(Explained(reply.text, explain(model, full, cache, fed, spans)))
    return tuple(explained)


def _check_positions(cache: KVCache, context: int, questions: list[Tensor]) -> int:
    """Return the length of context and longest question, or raise if a reply would have no position."""
    length = context + max((q.shape[1] for q in questions), default=0)
    if questions:  # without a question prefill itself refuses what is too long
        require_room_for_reply(cache.layout.max_positions, length)
    return length
