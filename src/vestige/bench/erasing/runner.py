"""Every sample through every eraser, on forks of one reading: one resumable run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige import erasers
from vestige.bench.erasing.aggregate import aggregate
from vestige.bench.erasing.config import BOUNDS, EraseBenchConfig
from vestige.bench.erasing.divergence import Listeners, compare, read
from vestige.bench.erasing.items import Item, collect
from vestige.bench.erasing.scoring import judged, passes, promises
from vestige.bench.results.aggregate import Record, Row
from vestige.bench.results.provenance import provenance
from vestige.bench.results.store import Store, run_all
from vestige.bench.tokenization import Renderer
from vestige.cache.attach import attach
from vestige.cache.batching import can_join
from vestige.cache.kv_cache import KVCache
from vestige.erasers.base import Erased
from vestige.erasers.erase import erase
from vestige.errors import VestigeError
from vestige.models.anatomy import check
from vestige.policies import Full
from vestige.spans import Span

_TRIAL, _TRIAL_SPAN = 48, Span(16, 24)

Progress = Callable[[int, int, str], None]


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
    """Put every sample through every method and return the rows; they are in ``out/rows.json`` too.

    Args:
        config: What to measure.
        model: Attached for as long as this runs.
        tokenizer: The model's.
        name: What rows call the model.
        out: Where records and rows go; a finished record is on disk before the next begins.
        resume: Go on with what is there. Methods, tasks, lengths, samples and policies may have been added since.
        command: What remakes these results.
        progress: Called with (samples x methods done, in all, what is next).

    Raises:
        VestigeError: Bad input, a method that cannot work with this model, or results that cannot be written. A method
            that fails on a sample is a row with ``error``.
    """
    origin, renderer = provenance(model), Renderer(tokenizer, model)
    items = collect(config, renderer)
    facts = {"model": name, **config.books()}
    with torch.no_grad(), attach(model):
        try_out(config, model, items[0])
        books = facts | {"weights": check(model).fingerprint(), "dtype": origin["dtype"]}
        store = Store(out, books, resume=resume)
        runner = Runner(config, renderer, store, origin, progress, len(items) * len(config.all_methods))

        def write() -> list[Row]:
            rows = aggregate(runner.records(), facts | origin)
            store.finish(rows, command)
            return rows

        try:
            return run_all(items, runner.run, write)
        finally:
            store.close()


def try_out(config: EraseBenchConfig, model: PreTrainedModel, item: Item) -> None:
    """Erase a few tokens by every method, so that one without an adapter, say, is known before hours of work.

    Raises:
        VestigeError: What the method says.
    """
    ids = item.context[:, :_TRIAL].to(model.device)
    cache = read(model, ids, KVCache(model, Full()))
    for method in config.all_methods:
        erase(cache.fork(), _TRIAL_SPAN, erasers.make(method), model=model, input_ids=ids)


class Runner:
    """Runs samples through all methods and writes records; knows what failed.

    Args:
        config: What to measure.
        renderer: Has the model, which is attached, and the tokenizer.
        store: Where records go.
        origin: Written into every record.
        progress: Told before every method.
        total: Samples x methods.
    """

    def __init__(
        self,
        config: EraseBenchConfig,
        renderer: Renderer,
        store: Store,
        origin: dict[str, Any],
        progress: Progress,
        total: int,
    ) -> None:
        self.config, self.renderer, self.store, self.origin = config, renderer, store, origin
        self.model = renderer.model
        self.progress, self.done, self.total = progress, 0, total
        self.failures: dict[tuple[str, int, str], Record] = {}

    def records(self) -> list[Record]:
        """Return all records there are, and what failed."""
        return [*self.store.records.values(), *self.failures.values()]

    def run(self, item: Item) -> None:
        """Run a sample through every method that still lacks it: all together, or if only what passes the filter
        counts, first what decides that."""
        every, only = self.config.all_methods, self.config.kept_only
        cache: KVCache | None = None
        clean: KVCache | None = None
        for methods in (every[:1], every[1:]) if only else (every,):
            self.progress(self.done, self.total, f"{item.sample.task} {' '.join(methods)}")
            self.done += len(methods)
            lacking = [method for method in methods if self._lacks(item, method)]
            noop = self._known(item, BOUNDS[0])
            if not lacking or (only and noop is not None and not noop["kept"]):
                continue
            if clean is None:
                clean = read(self.model, item.clean, KVCache(self.model, Full()))
            if only and noop is None and not self._promising(item, clean):
                self.store.append(self._unasked(item))
                continue
            if cache is None:
                cache = read(self.model, item.context, KVCache(self.model, self.config.make_policy()))
            for record in self._records(item, lacking, cache, clean):
                self.store.append(record)
        self.progress(self.done, self.total, item.sample.task)

    def _promising(self, item: Item, clean: KVCache) -> bool:
        """Return whether a sample can pass the filter, as far as the clean replies decide it."""
        listeners, found = Listeners(self.model, [clean]), list[Record]()
        for question, ids in zip(item.sample.questions, item.questions, strict=True):
            with listeners.asked(ids) as asked:
                (reply,) = asked.replies(question.max_new_tokens, self.renderer.stop()).replies
            text = self.renderer.text(reply)
            found.append(judged(question, text, text))
        return promises(found)

    def _unasked(self, item: Item) -> Record:
        """Return the record of a sample of which the clean replies decided that it does not pass."""
        about = {"tags": dict(item.sample.tags), "kept": False, "kept_only": False, "questions": []}
        return self._head(item, BOUNDS[0]) | about | {"digest": item.digest} | self.origin

    def _records(self, item: Item, methods: Sequence[str], cache: KVCache, clean: KVCache) -> Iterator[Record]:
        """Yield what methods did with a sample, but for those that failed, which is booked."""
        edited: dict[str, tuple[KVCache, Erased]] = {}
        for method in methods:
            fork, ids = cache.fork(), item.context.to(self.model.device)
            try:
                edited[method] = fork, erase(fork, item.spans, erasers.make(method), model=self.model, input_ids=ids)
            except VestigeError as error:
                self.failures[self._cell(item, method)] = self._head(item, method) | {"error": str(error)}
        if not edited:
            return
        every = [clean, *(fork for fork, _ in edited.values())]
        together = [every] if can_join(every) else [[one] for one in every]
        groups = [Listeners(self.model, caches) for caches in together]
        replies = [self._asked(item, which, groups) for which in range(len(item.questions))]
        for (method, (fork, done)), questions in zip(edited.items(), zip(*replies, strict=True), strict=False):
            noop = self._known(item, BOUNDS[0])  # its record comes first
            yield {
                **self._head(item, method),
                "tags": dict(item.sample.tags),
                "kept": passes(list(questions)) if method == BOUNDS[0] else bool(noop and noop["kept"]),
                "kept_only": self.config.kept_only and method != BOUNDS[0],
                "questions": list(questions),
                **_edited(done),
                "held": fork.held,
                "context_tokens": item.context.shape[1],
                "span_tokens": [len(span) for span in item.spans],
                "digest": item.digest,
                **self.origin,
            }

    def _asked(self, item: Item, which: int, groups: Sequence[Listeners]) -> list[Record]:
        """Return what edited caches say to one question, beside the clean reply.

        Args:
            item: The sample.
            which: Of its questions.
            groups: The clean cache and then the edited ones, together where they can be.
        """
        question, stop = item.sample.questions[which], self.renderer.stop()
        replies: list[tuple[int, ...]] = []
        logits: list[Tensor] = []
        for group in groups:
            with group.asked(item.questions[which]) as asked:
                replies += asked.replies(question.max_new_tokens, stop).replies
                logits += asked.forced(replies[0])  # the clean one
        wanted, unedited = replies[0], logits[0]
        return [
            {
                **judged(question, self.renderer.text(reply), self.renderer.text(wanted)),
                **asdict(compare(unedited, found)),
                "tokens": len(reply),
            }
            for reply, found in zip(replies[1:], logits[1:], strict=True)
        ]

    def _head(self, item: Item, method: str) -> Record:
        task, length, _ = self._cell(item, method)
        return {
            "task": task,
            "length": length,
            "index": item.sample.index,
            "arm": self.config.arm(method),
            "method": method,
        }

    @staticmethod
    def _cell(item: Item, method: str) -> tuple[str, int, str]:
        return item.sample.task, item.sample.length, method

    def _lacks(self, item: Item, method: str) -> bool:
        return self._cell(item, method) not in self.failures and self._known(item, method) is None

    def _known(self, item: Item, method: str) -> Record | None:
        """Return the record that is there.

        Raises:
            InputError: It was made from other data.
        """
        sample = item.sample
        return self.store.known(sample.task, sample.length, sample.index, self.config.arm(method), item.digest)


def _edited(done: Erased) -> dict[str, Any]:
    """Return what an edit did, as records and rows have it."""
    report = done.report
    return {
        "edit_s": report.edit_s,
        "slots_dropped": report.slots_dropped,
        "slots_replaced": report.slots_replaced,
        "slots_left": report.slots_left,
        "suffix_left": report.suffix_left,
        "tokens_recomputed": report.tokens_recomputed,
    }
