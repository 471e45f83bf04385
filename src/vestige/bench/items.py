"""The samples of a run as token ids, and which of them share a batch."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256

from vestige.bench import tasks
from vestige.bench.config import BenchConfig
from vestige.bench.methods.conversation import Job
from vestige.bench.metrics.scores import METRICS
from vestige.bench.sample import Sample
from vestige.bench.tokenization import Renderer
from vestige.errors import InputError
from vestige.models.layout import check

PAD_SHARE = 0.05
"""Samples share a batch while pads are at most this part of it."""


@dataclass(frozen=True)
class Item:
    """A sample and its token ids."""

    sample: Sample
    job: Job
    rank: int
    """Its place among the samples of its (task, length)."""

    @property
    def digest(self) -> str:
        """What tells whether a record was made from these very ids, and scored by these answers."""
        return sha256(repr((self.job.turns, self.job.stop, self.sample.turns)).encode()).hexdigest()[:16]


def collect(config: BenchConfig, renderer: Renderer) -> Iterator[Item]:
    """Yield every sample with its ids, each once.

    Raises:
        InputError: A sample leaves no position for a reply, or could not be scored: before hours of work, not after.
    """
    limit, counts, known = check(renderer.model).max_positions, Counter[tuple[str, int]](), set()
    for name in config.tasks:
        for length in config.lengths or (None,):
            for sample in tasks.make(name, _order(config, renderer, name, length or _longest(name, limit))):
                job = renderer.job(sample.turns)
                if limit is not None and job.tokens > limit:
                    raise InputError(
                        f"sample {sample.index} of {sample.task} takes {job.tokens} tokens, reply included; "
                        f"the model has {limit} positions"
                    )
                for turn in sample.turns:
                    METRICS[turn.metric](next(iter(turn.answers), ""), turn)
                cell = (sample.task, sample.length)
                if (*cell, sample.index) not in known:
                    known.add((*cell, sample.index))
                    yield Item(sample, job, counts[cell])
                    counts[cell] += 1


def _longest(name: str, limit: int | None) -> int | None:
    """Return the length of a task that has none: LongBench cuts its texts to what the model can read."""
    return limit if name.startswith("longbench") else None


def _order(config: BenchConfig, renderer: Renderer, name: str, length: int | None) -> tasks.Order:
    return tasks.Order(
        count=renderer.count,
        measure=renderer.measure,
        length=length,
        samples=config.samples,
        split="dev" if config.split == "dev" else "test",
        seed=config.seed,
        answer_room=config.answer_room,
        essays=config.essays,
        qa=config.qa,
        file={"cases": config.cases, "longbench": config.longbench}.get(re.split("[/-]", name)[0]),
        prompts=config.prompts,
    )


def batches(items: Iterable[Item], most: int, *, even: bool = False) -> Iterator[list[Item]]:
    """Yield neighbours of one (task, length) together, while they have one turn and pads stay few; none if ``even``."""
    group: list[Item] = []
    for item in items:
        if group and not (len(group) < most and _fits(group, item, 0.0 if even else PAD_SHARE)):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _fits(group: list[Item], item: Item, pad_share: float) -> bool:
    together = [*group, item]
    if len({(i.sample.task, i.sample.length) for i in together}) > 1 or any(len(i.job.turns) > 1 for i in together):
        return False
    widths = [len(i.job.turns[0].context) for i in together]
    return max(widths) * len(widths) - sum(widths) <= pad_share * sum(widths)
