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
from vestige.bench.sample import BaseItem, Sample
from vestige.bench.tokenization import Renderer
from vestige.errors import InputError
from vestige.models.layout import check

PAD_SHARE = 0.05
"""Samples share a batch while its padding is at most this part of the tokens."""


@dataclass(frozen=True)
class Item(BaseItem):
    """A sample and its token ids."""

    sample: Sample
    job: Job
    rank: int
    """Its index among the samples of its (task, length)."""

    @property
    def digest(self) -> str:
        return hash_parts(self.job.turns, self.job.stop, self.sample.turns)


def hash_parts(*parts: object) -> str:
    """Return a short hash of the text of some values."""
    return sha256(repr(parts).encode()).hexdigest()[:16]


def collect(config: BenchConfig, renderer: Renderer) -> Iterator[Item]:
    """Yield every sample with its ids, each once.

    Raises:
        InputError: A sample leaves no position for a reply, or cannot be scored. This is known before hours of work.
    """
    limit, counts, known = check(renderer.model).max_positions, Counter[tuple[str, int]](), set()
    for name in config.tasks:
        for length in config.lengths or (None,):
            spec = config.task_spec(
                renderer,
                length or (limit if name.startswith("longbench") else None),  # cuts texts to the model's positions
                answer_room=config.answer_room,
                file={"cases": config.cases, "longbench": config.longbench}.get(re.split("[/-]", name)[0]),
                prompts=config.prompts,
            )
            for sample in tasks.make(name, spec):
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


def make_batches(items: Iterable[Item], most: int, *, even: bool = False) -> Iterator[list[Item]]:
    """Yield batches of neighbours of one (task, length) that have one turn and need little padding.

    Args:
        items: All samples, in order.
        most: Samples of a batch at most.
        even: Allow no padding.
    """
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
    rows = {(item.sample.task, item.sample.length) for item in together}
    if len(rows) > 1 or any(len(item.job.turns) > 1 for item in together):
        return False
    widths = [len(item.job.turns[0].context) for item in together]
    return max(widths) * len(widths) - sum(widths) <= pad_share * sum(widths)
