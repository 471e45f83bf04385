"""How accurate, how small, how fast: every sample through every arm, ours and peers', in one resumable run."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.bench.config import BenchConfig
from vestige.bench.items import Item, batches, collect
from vestige.bench.methods import peers, vestige_runner
from vestige.bench.methods.conversation import Outcome
from vestige.bench.methods.method import Arm
from vestige.bench.metrics.scores import METRICS
from vestige.bench.results.aggregate import Record, Row, aggregate
from vestige.bench.results.provenance import provenance
from vestige.bench.results.store import Store, run_all
from vestige.bench.tokenization import Renderer
from vestige.cache.attach import attach
from vestige.errors import BudgetError, VestigeError
from vestige.models.layout import check


def bench(
    config: BenchConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    out: Path,
    resume: bool = False,
    command: str | None = None,
    progress: Callable[[int, int, str], None] = lambda done, of, what: None,
) -> list[Row]:
    """Run every sample through every arm and return the rows; they are in ``out/rows.json`` too, never a minute late.

    Args:
        config: What to measure.
        model: Attached for as long as this runs.
        tokenizer: The model's.
        name: What rows call the model.
        out: Where records and rows go; a finished sample is on disk before the next begins.
        resume: Go on with what is there. Arms, tasks and samples may have been added since.
        command: What remakes these results, for the report.
        progress: Called with (samples x arms done, in all, the arm that is next).

    Raises:
        VestigeError: Bad input, or results that cannot be written. An arm that fails is a row with ``error``; a sample
            that is too short for an arm's budget is left out, and the row's ``note`` says so.
    """
    origin = provenance(model)
    renderer = Renderer(tokenizer, model, question_aware=config.question_aware)
    groups = list(batches(collect(config, renderer), config.batch, even=config.chunk is not None))
    facts = {"model": name, **config.books()}
    books = facts | {"weights": check(model).fingerprint(), "dtype": origin["dtype"]}
    store = Store(out, books, resume=resume)
    runner = _Runner(config, renderer, store, origin, progress, sum(map(len, groups)) * len(config.arms))

    def write() -> list[Row]:
        failures = [*runner.failures.values(), *runner.left_out.values()]
        rows = aggregate(store.records.values(), failures, facts | origin)
        store.finish(rows, command)
        return rows

    try:
        with torch.no_grad(), attach(model):
            rows = run_all(groups, runner.run, write)
    finally:
        runner.peer.close()
        store.close()
    return rows


class _Runner:
    """Runs groups of samples through all arms and writes records; knows which peers are open and what failed."""

    def __init__(
        self,
        config: BenchConfig,
        renderer: Renderer,
        store: Store,
        origin: dict[str, Any],
        progress: Callable[[int, int, str], None],
        total: int,
    ) -> None:
        self.config, self.renderer, self.store, self.origin = config, renderer, store, origin
        self.progress, self.done, self.total = progress, 0, total
        self.failures: dict[tuple[str, int, Arm], Record] = {}
        self.left_out: dict[tuple[str, int, Arm], Record] = {}
        self.trained: dict[Arm, str] = {}
        self.peer = peers.OpenPeers(renderer.model)

    def run(self, group: list[Item]) -> None:
        """Run a group through every arm that still lacks it."""
        readings: dict[Hashable, vestige_runner.Reading] = {}
        todo = {arm: self._lacking(arm, group) for arm in self.config.arms}
        sharing = {
            arm: self._company(arm) for arm, items in todo.items() if items == group and self._shares(arm, group)
        }
        for arm, items in todo.items():
            self.progress(self.done, self.total, f"{group[0].sample.task} {arm.name}")
            if arm in sharing and (company := sharing[arm]) not in readings:
                observers = [one.make_policy(self.config.seed) for one in sharing if sharing[one] == company]
                try:
                    readings[company] = vestige_runner.read(
                        self.renderer.model, [item.job for item in group], observers
                    )
                except VestigeError:  # each alone says what is wrong with it
                    sharing = {one: other for one, other in sharing.items() if other != company}
            if items:
                self._run_arm(arm, items, readings[sharing[arm]] if arm in sharing else None)
            self.done += len(group)
        self.progress(self.done, self.total, group[0].sample.task)

    def _run_arm(self, arm: Arm, items: list[Item], reading: vestige_runner.Reading | None) -> None:
        outcomes = self._outcomes(arm, items, reading)
        for i, item in enumerate(items):
            try:
                outcome = next(outcomes)
            except BudgetError as error:
                if arm.peer is not None or len(items) == 1:  # the error ended the generator: go on behind the sample
                    self._leave_out(arm, item, error)
                    return self._run_arm(arm, items[i + 1 :], None)
                for alone in items:  # a batch falls with its shortest sample
                    self._run_arm(arm, [alone], None)
                return
            except VestigeError as error:
                self.failures[_cell(arm, item)] = self._failure(arm, item, error)
                return
            if self._known(arm, item) is None:
                self.store.append(self._record(arm, item, outcome, len(items)))

    def _leave_out(self, arm: Arm, item: Item, error: BudgetError) -> None:
        """Book a sample that is too short for a budget: longer ones are none the worse for it."""
        before = self.left_out.get(_cell(arm, item), {}).get("left_out", 0)
        self.left_out[_cell(arm, item)] = self._failure(arm, item, error) | {"left_out": before + 1}

    def _failure(self, arm: Arm, item: Item, error: VestigeError) -> Record:
        sample = item.sample
        return {"task": sample.task, "length": sample.length, "arm": arm.key, "error": str(error)} | self.origin

    def _outcomes(self, arm: Arm, items: list[Item], reading: vestige_runner.Reading | None) -> Iterator[Outcome]:
        """Yield what each sample took; a peer runs them one by one, so none is lost if it is interrupted."""
        if arm.peer is None:
            yield from vestige_runner.run(
                self.renderer.model,
                [item.job for item in items],
                arm.make_policy(self.config.seed),
                memory=arm.make_memory(),
                chunk=self.config.chunk,
                reading=reading,
            )
            return
        for item in items:
            turn, model = item.job.turns[0], self.renderer.model
            seen, length = len(turn.context), len(turn.context) + len(turn.question)
            keep = peers.pairs_to_keep(arm.peer, arm.budget, model, seen=seen, length=length)
            yield self.peer(arm.peer).run(replace(item.job, keep=keep))

    def _shares(self, arm: Arm, group: list[Item]) -> bool:
        width = max(len(item.job.turns[0].context) for item in group)
        return arm.peer is None and (self.config.chunk is None or self.config.chunk >= width)

    def _company(self, arm: Arm) -> Hashable:
        return vestige_runner.company(arm.make_policy(self.config.seed))

    def _lacking(self, arm: Arm, group: list[Item]) -> list[Item]:
        """Return the samples that an arm must run, none if it failed: of ours whole batches, so that bits repeat."""
        if _cell(arm, group[0]) in self.failures:
            return []
        items = [item for item in group if arm.samples is None or item.rank < arm.samples]
        missing = [item for item in items if self._known(arm, item) is None]
        return items if missing and arm.peer is None else missing

    def _known(self, arm: Arm, item: Item) -> Record | None:
        """Return the record that is there.

        Raises:
            InputError: It was made from other data or with other weights.
        """
        sample = item.sample
        return self.store.known(sample.task, sample.length, sample.index, arm.key, item.digest, self._trained(arm))

    def _trained(self, arm: Arm) -> str:
        if arm not in self.trained:
            try:
                self.trained[arm] = arm.weights(self.renderer.model)
            except VestigeError:
                self.trained[arm] = ""  # running it says what is wrong
        return self.trained[arm]

    def _record(self, arm: Arm, item: Item, outcome: Outcome, batch: int) -> Record:
        turns = [
            {
                **{name: getattr(turn, name) for name in _TURN},
                "prediction": (text := self.renderer.text(reply)),
                "score": METRICS[turn.metric](text, turn),
            }
            for turn, reply in zip(item.sample.turns, outcome.replies, strict=True)
        ]
        measured = asdict(outcome)
        del measured["replies"]
        sample = item.sample
        return {
            "task": sample.task,
            "length": sample.length,
            "index": sample.index,
            "tags": dict(sample.tags),
            "arm": arm.key,
            "turns": turns,
            "score": sum(turn["score"] for turn in turns) / len(turns),
            **measured,
            "kept_fraction": outcome.held / outcome.full if outcome.full else 1.0,
            "batch": batch if arm.peer is None else 1,
            "digest": item.digest,
            "trained": self._trained(arm),
            **self.origin,
        }


def _cell(arm: Arm, item: Item) -> tuple[str, int, Arm]:
    return item.sample.task, item.sample.length, arm


_TURN = ("question", "answer_prefix", "answers", "metric", "max_new_tokens")
