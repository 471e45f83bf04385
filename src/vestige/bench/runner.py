"""The benchmark of accuracy, bytes and time: every sample goes through every method, vestige's and peers', in one
resumable run."""

from collections.abc import Hashable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.bench.config import BenchConfig
from vestige.bench.items import Item, collect, make_batches
from vestige.bench.methods import peers, vestige_runner
from vestige.bench.methods.conversation import Outcome
from vestige.bench.methods.method import Method
from vestige.bench.metrics.scores import METRICS
from vestige.bench.results.aggregate import Record, Row, aggregate
from vestige.bench.run import Cell, Progress, Run, cell_of, identify
from vestige.bench.tokenization import Renderer
from vestige.errors import BudgetError, VestigeError

_TURN = ("question", "answer_prefix", "answers", "metric", "max_new_tokens")


def bench(
    config: BenchConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    out: Path,
    resume: bool = False,
    command: str | None = None,
    progress: Progress = lambda done, of, what: None,
) -> list[Row]:
    """Run every sample through every method and return the rows, which ``out/rows.json`` has too.

    Args:
        config: Tasks, samples and methods.
        model: Attached for as long as this runs.
        tokenizer: The model's.
        name: The model's name in rows.
        out: The folder for records and rows; a finished sample is on disk before the next begins.
        resume: Continue with the records that are there. Methods, tasks and samples may have been added since.
        command: The command that makes these results, for the report.
        progress: Called with (samples x methods done, in all, the method that is next).

    Raises:
        VestigeError: Bad input, or results that cannot be written. A method that fails is a row with ``error``; a
            sample that is too short for a method's budget is left out, and the row's ``note`` says so.
    """
    renderer = Renderer(tokenizer, model, question_aware=config.question_aware)
    groups = list(make_batches(collect(config, renderer), config.batch, even=config.chunk is not None))
    total = sum(map(len, groups)) * len(config.methods)
    run = Run(config, model, name=name, out=out, resume=resume, progress=progress, total=total)
    runner = _Runner(config, renderer, run)
    with runner.peer:
        return run.execute(groups, runner.run_group, runner.make_rows, command)


class _Runner:
    """Runs groups of samples through all methods and writes records; has the open peers."""

    def __init__(self, config: BenchConfig, renderer: Renderer, run: Run) -> None:
        self.config, self.renderer, self.run, self.store = config, renderer, run, run.store
        self.left_out: dict[Cell, Record] = {}
        self.peer = peers.OpenPeers(renderer.model)

    def make_rows(self) -> list[Row]:
        """Return the rows of the records and failures so far."""
        failures = [*self.run.failures.values(), *self.left_out.values()]
        return aggregate(self.store.records.values(), failures, self.run.facts | self.run.origin)

    def run_group(self, group: list[Item]) -> None:
        """Run a group through every method that still lacks it."""
        readings: dict[Hashable, vestige_runner.Reading] = {}
        todo = {method: self._list_missing(method, group) for method in self.config.methods}
        keys = {
            method: vestige_runner.sharing_key(method.make_policy(self.config.seed))
            for method, items in todo.items()
            if items == group and self._can_share(method, group)
        }
        for method, items in todo.items():
            self.run.report(f"{group[0].sample.task} {method.name}")
            if method in keys and (key := keys[method]) not in readings:
                observers = [sharer.make_policy(self.config.seed) for sharer in keys if keys[sharer] == key]
                try:
                    readings[key] = vestige_runner.read(self.renderer.model, [item.job for item in group], observers)
                except VestigeError:  # each method alone raises its own error
                    keys = {sharer: other for sharer, other in keys.items() if other != key}
            if items:
                self._run_method(method, items, readings[keys[method]] if method in keys else None)
            self.run.done += len(group)
        self.run.report(group[0].sample.task)

    def _run_method(self, method: Method, items: list[Item], reading: vestige_runner.Reading | None) -> None:
        outcomes = self._yield_outcomes(method, items, reading)
        for i, item in enumerate(items):
            try:
                outcome = next(outcomes)
            except BudgetError as error:
                if method.peer is not None or len(items) == 1:  # the error ended the generator: start after the sample
                    self._leave_out(method, item, error)
                    return self._run_method(method, items[i + 1 :], None)
                for alone in items:  # a batch falls with its shortest sample
                    self._run_method(method, [alone], None)
                return
            except VestigeError as error:
                return self.run.fail(item, method, error)
            if self.run.find(item, method) is None:
                self.store.append(self._make_record(method, item, outcome, len(items)))

    def _leave_out(self, method: Method, item: Item, error: BudgetError) -> None:
        """Count a sample that is too short for a budget; longer samples still run."""
        cell = cell_of(item, method)
        before = self.left_out.get(cell, {}).get("left_out", 0)
        failure = identify(item, method) | {"error": str(error)} | self.run.origin
        self.left_out[cell] = failure | {"left_out": before + 1}

    def _yield_outcomes(
        self, method: Method, items: list[Item], reading: vestige_runner.Reading | None
    ) -> Iterator[Outcome]:
        """Yield the outcome of each sample; a peer runs them one by one, so none is lost if it is interrupted."""
        if method.peer is None:
            yield from vestige_runner.run(
                self.renderer.model,
                [item.job for item in items],
                method.make_policy(self.config.seed),
                memory=method.make_memory(),
                chunk=self.config.chunk,
                reading=reading,
            )
            return
        for item in items:
            turn, model = item.job.turns[0], self.renderer.model
            seen, length = len(turn.context), len(turn.context) + len(turn.question)
            keep = peers.pairs_to_keep(method.peer, method.budget, model, seen=seen, length=length)
            yield self.peer(method.peer).run(replace(item.job, keep=keep))

    def _can_share(self, method: Method, group: list[Item]) -> bool:
        """Return whether a method can work on a fork of a reading in one piece."""
        width = max(len(item.job.turns[0].context) for item in group)
        return method.peer is None and (self.config.chunk is None or self.config.chunk >= width)

    def _list_missing(self, method: Method, group: list[Item]) -> list[Item]:
        """Return the samples that a method must run, none if it failed.

        Vestige's own methods run whole batches again, so that bits repeat.
        """
        if cell_of(group[0], method) in self.run.failures:
            return []
        items = [item for item in group if method.samples is None or item.rank < method.samples]
        missing = [item for item in items if self.run.find(item, method) is None]
        return items if missing and method.peer is None else missing

    def _make_record(self, method: Method, item: Item, outcome: Outcome, batch: int) -> Record:
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
        return {
            **identify(item, method),
            "tags": dict(item.sample.tags),
            "turns": turns,
            "score": sum(turn["score"] for turn in turns) / len(turns),
            **measured,
            "kept_fraction": outcome.held / outcome.full if outcome.full else 1.0,
            "batch": batch if method.peer is None else 1,
            "digest": item.digest,
            "trained": self.run.find_weights(method),
            **self.run.origin,
        }
