"""The benchmark of erasers: every sample goes through every eraser, on forks of one reading, in one resumable run."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige import erasers
from vestige.bench.erasing.aggregate import aggregate
from vestige.bench.erasing.config import EraseBenchConfig, add_bounds
from vestige.bench.erasing.divergence import BatchedCaches, compare, read
from vestige.bench.erasing.items import Item, collect
from vestige.bench.erasing.scoring import clean_is_correct, keep_sample, score_reply
from vestige.bench.methods.method import Method
from vestige.bench.results.aggregate import Record, Row
from vestige.bench.run import Progress, Run, cell_of, identify
from vestige.bench.tokenization import Renderer
from vestige.cache.attach import attach
from vestige.cache.batching import can_join
from vestige.cache.kv_cache import KVCache
from vestige.erasers.base import Erased
from vestige.erasers.erase import erase
from vestige.errors import VestigeError
from vestige.policies import Full
from vestige.spans import Span

_TRIAL, _TRIAL_SPAN = 48, Span(16, 24)
_REPORTED = ("edit_s", "slots_dropped", "slots_replaced", "slots_left", "suffix_left", "tokens_recomputed")


def bench_erase(
    config: EraseBenchConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    out: Path,
    resume: bool = False,
    command: str | None = None,
    progress: Progress = lambda done, of, what: None,
) -> list[Row]:
    """Run every sample through every eraser and return the rows; arguments as for :func:`vestige.bench.runner.bench`.

    A resumed run may add erasers, tasks, lengths, samples and policies.

    Raises:
        VestigeError: Bad input, an eraser that cannot work with this model, or results that cannot be written. An
            eraser that fails on a sample is a row with ``error``.
    """
    renderer = Renderer(tokenizer, model)
    items, methods = collect(config, renderer), config.make_methods()
    with torch.no_grad(), attach(model):
        try_out(config, model, items[0])
    total = len(items) * len(methods)
    run = Run(config, model, name=name, out=out, resume=resume, progress=progress, total=total)
    runner = _Runner(config, methods, renderer, run)
    return run.execute(items, runner.run_item, runner.make_rows, command)


def try_out(config: EraseBenchConfig, model: PreTrainedModel, item: Item) -> None:
    """Erase a few tokens by every method: one without its adapter, say, fails before hours of work.

    Raises:
        VestigeError: The error of the method.
    """
    ids = item.context[:, :_TRIAL].to(model.device)
    cache = read(model, ids, KVCache(model, Full()))
    for method in add_bounds(config.methods):
        erase(cache.fork(), _TRIAL_SPAN, erasers.make(method), model=model, input_ids=ids)


class _Runner:
    """Runs samples through all methods, ``noop`` first, and writes records."""

    def __init__(self, config: EraseBenchConfig, methods: tuple[Method, ...], renderer: Renderer, run: Run) -> None:
        self.config, self.methods, self.renderer, self.run, self.store = config, methods, renderer, run, run.store
        self.model, self.noop = renderer.model, methods[0]

    def make_rows(self) -> list[Row]:
        """Return the rows of the records and failures so far."""
        return aggregate([*self.store.records.values(), *self.run.failures.values()], self.run.facts | self.run.origin)

    def run_item(self, item: Item) -> None:
        """Run a sample through every method that still lacks it.

        All methods run together. With ``kept_only``, ``noop`` runs first, since it decides whether the others run.
        """
        only = self.config.kept_only
        cache: KVCache | None = None
        clean: KVCache | None = None
        for methods in (self.methods[:1], self.methods[1:]) if only else (self.methods,):
            self.run.report(" ".join([item.sample.task, *(str(method.eraser) for method in methods)]))
            self.run.done += len(methods)
            pending = [method for method in methods if cell_of(item, method) not in self.run.failures]
            missing = [method for method in pending if self.run.find(item, method) is None]
            noop = self.run.find(item, self.noop)
            if not missing or (only and noop is not None and not noop["kept"]):
                continue
            if clean is None:
                clean = read(self.model, item.clean, KVCache(self.model, Full()))
            if only and noop is None and not self._clean_is_correct(item, clean):
                about = {"tags": dict(item.sample.tags), "kept": False, "kept_only": False, "questions": []}
                self.store.append(identify(item, self.noop) | about | {"digest": item.digest} | self.run.origin)
                continue
            if cache is None:
                cache = read(self.model, item.context, KVCache(self.model, self.config.make_policy()))
            for record in self._yield_records(item, missing, cache, clean):
                self.store.append(record)
        self.run.report(item.sample.task)

    def _clean_is_correct(self, item: Item, clean: KVCache) -> bool:
        """Return whether a sample can pass the filter, as far as the clean replies decide it."""
        batched, found = BatchedCaches(self.model, [clean]), list[Record]()
        for question, ids in zip(item.sample.questions, item.questions, strict=True):
            with batched.ask(ids) as asked:
                (reply,) = asked.decode(question.max_new_tokens, self.renderer.stop()).replies
            text = self.renderer.text(reply)
            found.append(score_reply(question, text, text))
        return clean_is_correct(found)

    def _yield_records(self, item: Item, methods: Sequence[Method], cache: KVCache, clean: KVCache) -> Iterator[Record]:
        """Yield the record of each method on a sample; a method that fails is a failure of the run instead."""
        edited: dict[Method, tuple[KVCache, Erased]] = {}
        for method in methods:
            fork, ids, eraser = cache.fork(), item.context.to(self.model.device), erasers.make(str(method.eraser))
            try:
                edited[method] = fork, erase(fork, item.spans, eraser, model=self.model, input_ids=ids)
            except VestigeError as error:
                self.run.fail(item, method, error)
        if not edited:
            return
        caches = [clean, *(fork for fork, _ in edited.values())]
        batches = [caches] if can_join(caches) else [[cache] for cache in caches]
        groups = [BatchedCaches(self.model, batch) for batch in batches]
        replies = [self._ask(item, index, groups) for index in range(len(item.questions))]
        for (method, (fork, done)), questions in zip(edited.items(), zip(*replies, strict=True), strict=False):
            noop = self.run.find(item, self.noop)  # its record comes first
            yield {
                **identify(item, method),
                "tags": dict(item.sample.tags),
                "kept": keep_sample(list(questions)) if method == self.noop else bool(noop and noop["kept"]),
                "kept_only": self.config.kept_only and method != self.noop,
                "questions": list(questions),
                **{name: getattr(done.report, name) for name in _REPORTED},
                "held": fork.held,
                "context_tokens": item.context.shape[1],
                "span_tokens": [len(span) for span in item.spans],
                "digest": item.digest,
                **self.run.origin,
            }

    def _ask(self, item: Item, index: int, groups: Sequence[BatchedCaches]) -> list[Record]:
        """Return the replies of edited caches to one question, scored against that of the clean cache, the first."""
        question, stop = item.sample.questions[index], self.renderer.stop()
        replies: list[tuple[int, ...]] = []
        logits: list[Tensor] = []
        for group in groups:
            with group.ask(item.questions[index]) as asked:
                replies += asked.decode(question.max_new_tokens, stop).replies
                logits += asked.score(replies[0])  # the clean one
        return [
            {
                **score_reply(question, self.renderer.text(reply), self.renderer.text(replies[0])),
                **asdict(compare(logits[0], edited_logits)),
                "tokens": len(reply),
            }
            for reply, edited_logits in zip(replies[1:], logits[1:], strict=True)
        ]
