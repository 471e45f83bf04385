"""A resumable run of a benchmark: its records, its failures, and its progress."""

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from vestige.bench.config import RunConfig
from vestige.bench.methods.method import Method
from vestige.bench.results.aggregate import Record, Row
from vestige.bench.results.provenance import collect_provenance
from vestige.bench.results.store import Store
from vestige.bench.sample import BaseItem
from vestige.cache.attach import attach
from vestige.errors import InputError, VestigeError
from vestige.models.layout import check

Cell = tuple[str, int, Method]
"""The task, length and method of a row."""
Progress = Callable[[int, int, str], None]
ROWS_EVERY_S = 60.0
"""Seconds between writes of the rows, so that a user can follow a run."""

T = TypeVar("T")


class Run:
    """The records and failures of one run; arguments as for :func:`vestige.bench.runner.bench`.

    Raises:
        InputError: The folder cannot be used, or its run had other settings.
    """

    def __init__(
        self,
        config: RunConfig,
        model: PreTrainedModel,
        *,
        name: str,
        out: Path,
        resume: bool,
        progress: Progress,
        total: int,
    ) -> None:
        self.model, self.origin = model, collect_provenance(model)
        self.facts = {"model": name, **config.fixed_settings()}
        settings = self.facts | {"weights": check(model).fingerprint(), "dtype": self.origin["dtype"]}
        self.store = Store(out, settings, resume=resume)
        self.progress, self.done, self.total = progress, 0, total
        self.failures: dict[Cell, Record] = {}
        self._trained: dict[Method, str] = {}

    def execute(
        self,
        groups: Iterable[T],
        run_group: Callable[[T], None],
        make_rows: Callable[[], list[Row]],
        command: str | None,
    ) -> list[Row]:
        """Run all groups and return the rows; they are written now and then, and at the end, even after an error."""

        def write() -> list[Row]:
            rows = make_rows()
            self.store.finish(rows, command)
            return rows

        written = time.monotonic()
        with contextlib.closing(self.store), torch.no_grad(), attach(self.model):
            try:
                for group in groups:
                    run_group(group)
                    if time.monotonic() - written > ROWS_EVERY_S:
                        write()
                        written = time.monotonic()
            except BaseException:
                with contextlib.suppress(InputError):  # the disk may be full; the first error counts
                    write()
                raise
            return write()

    def report(self, following: str) -> None:
        """Report the progress and what follows."""
        self.progress(self.done, self.total, following)

    def find(self, item: BaseItem, method: Method) -> Record | None:
        """Return the record of a sample and method, or None if there is none.

        Raises:
            InputError: It was made from other data or with other weights.
        """
        sample, weights = item.sample, self.find_weights(method)
        return self.store.find(sample.task, sample.length, sample.index, method.key, item.digest, weights)

    def find_weights(self, method: Method) -> str:
        """Return the hash of a method's trained weights; empty if there are none, or they cannot be found."""
        if method not in self._trained:
            try:
                self._trained[method] = method.weights(self.model)
            except VestigeError:
                self._trained[method] = ""  # running the method raises the error
        return self._trained[method]

    def fail(self, item: BaseItem, method: Method, error: VestigeError) -> None:
        """Record that a method failed on a sample."""
        self.failures[cell_of(item, method)] = identify(item, method) | {"error": str(error)} | self.origin


def cell_of(item: BaseItem, method: Method) -> Cell:
    """Return the cell of a sample and method."""
    return item.sample.task, item.sample.length, method


def identify(item: BaseItem, method: Method) -> Record:
    """Return the keys that tell a record from all others."""
    sample = item.sample
    head: Record = {"task": sample.task, "length": sample.length, "index": sample.index, "arm": method.key}
    return head if method.eraser is None else head | {"method": method.eraser}
