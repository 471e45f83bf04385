"""Whether eviction helps where distractors take attention away: answers, and attention to the needle, before and after.

``make results-dilution ESSAYS=DIR`` runs it on the test split. Source of the claim: "Make Each Token Count" (arXiv
2605.09649): attention that goes to useless tokens is lost, so a cache without them can be better than a full one. The
texts are RULER's with three other keys among essays, and one that has a needle in every sentence.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige import policies
from vestige.attachment import attach
from vestige.bench import items, ours
from vestige.bench.config import BenchConfig
from vestige.bench.items import Item
from vestige.bench.metrics import METRICS
from vestige.bench.render import Renderer
from vestige.bench.rows import Row, resampled
from vestige.budget import Budget
from vestige.explain import attention_to, share_of
from vestige.policies import Full
from vestige.policy import Policy
from vestige.reading import announce, finish
from vestige.recipes.evidence import span_of
from vestige.recipes.retention import ANSWER_ROOM, MODEL, RETENTION, RIVALS
from vestige.recipes.running import Dev, Essays, Out, split_of

TASKS = ("ruler/niah_multikey_1", "ruler/niah_multikey_2")
METHODS = (RETENTION, RIVALS[0])
BUDGETS = ("0.75", "0.5", "0.25", "0.1")
LENGTH, SAMPLES = 1024, 50
COMMAND = "make results-dilution ESSAYS=DIR"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One sample under one method and budget: its score, and what share of attention goes past the needle."""

    task: str
    method: str
    budget: str
    score: float
    score_full: float
    dilution: float
    dilution_full: float


def measure(config: BenchConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Seen]:
    """Yield what each method makes of each sample; attention is that of the question and the full cache's reply."""
    made = {(name, budget): policies.make(name, Budget.parse(budget)) for name in METHODS for budget in BUDGETS}
    renderer = Renderer(tokenizer, model)
    for item in items.collect(config, renderer):
        turn = item.job.turns[0]
        at = span_of([renderer.text([token]) for token in turn.context], item.sample.turns[0].answers[0])
        assert at, "a needle's value stands in its text"
        needle = torch.arange(at.start, at.stop)
        with torch.no_grad(), attach(model):
            reading = ours.read(model, [item.job], list(made.values()))
            score_full, reply = _answered(renderer, item, Full(), reading)
            asked = torch.tensor([[*turn.question, *reply]])
            dilution_full = 1 - share_of(attention_to(model, reading.cache, asked, needle))
            for (name, budget), policy in made.items():
                cache = reading.ready_for(model, policy)[0].fork(policy)
                announce(cache, len(turn.context) + len(turn.question), 1)
                finish(model, cache, reading.ids)
                yield Seen(
                    task=item.sample.task,
                    method=name,
                    budget=budget,
                    score=_answered(renderer, item, policy, reading)[0],
                    score_full=score_full,
                    dilution=1 - share_of(attention_to(model, cache, asked, needle)),
                    dilution_full=dilution_full,
                )


def _answered(renderer: Renderer, item: Item, policy: Policy, reading: ours.Reading) -> tuple[float, list[int]]:
    (outcome,) = ours.run(renderer.model, [item.job], policy, reading=reading)
    reply, turn = outcome.replies[0], item.sample.turns[0]
    return METRICS[turn.metric](renderer.text(reply), turn), [token for token in reply if token not in item.job.stop]


def rows_of(seen: Iterable[Seen]) -> list[Row]:
    """Return by task, method and budget the mean scores and dilutions, and the gain over the full cache."""
    groups: dict[tuple[str, str, str], list[Seen]] = {}
    for one in seen:
        groups.setdefault((one.task, one.method, one.budget), []).append(one)
    rows = []
    for (task, method, budget), group in groups.items():
        gains = [one.score - one.score_full for one in group]
        means = {
            name: sum(getattr(one, name) for one in group) / len(group)
            for name in ("score", "score_full", "dilution", "dilution_full")
        }
        rows.append(
            {"task": task, "method": method, "budget": budget, "n": len(group)}
            | means
            | {"gain": sum(gains) / len(gains), "gain_ci95": resampled(gains)}
        )
    return rows


def table(rows: Iterable[Row]) -> str:
    """Return Markdown of :func:`rows_of`."""
    lines = [
        "| task | method | budget | samples | full | score | gain | dilution, full | dilution |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        low, high = row["gain_ci95"]
        lines.append(
            f"| {row['task']} | {row['method']} | {row['budget']} | {row['n']} | {row['score_full']:.2f} "
            f"| {row['score']:.2f} | {row['gain']:+.2f} ({low:+.2f} to {high:+.2f}) "
            f"| {row['dilution_full']:.3f} | {row['dilution']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main(
    out: Out,
    essays: Essays = None,
    samples: Annotated[int, typer.Option(help="Of each task.")] = SAMPLES,
    dev: Dev = False,
) -> None:
    """Measure, print the table, and write it."""
    from rich.progress import track

    from vestige.bench.store import write_atomically
    from vestige.download import load

    config = BenchConfig(
        tasks=TASKS,
        arms=(),
        lengths=(LENGTH,),
        samples=samples,
        split=split_of(dev),
        answer_room=ANSWER_ROOM,
        essays=essays,
    )
    total = len(TASKS) * samples * len(METHODS) * len(BUDGETS)
    rows = rows_of(track(measure(config, *load(MODEL)), "dilution", total))
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "dilution.json", json.dumps(rows, indent=1) + "\n")
    write_atomically(out / "dilution.md", f"# Dilution\n\nRemade by `{COMMAND}`.\n\n{table(rows)}")
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
