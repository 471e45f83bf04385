"""Whether eviction helps where distractors take attention away: answers, and attention to the needle, before and after.

``make results-dilution ESSAYS=DIR`` runs it on the test split. Source of the claim: "Make Each Token Count" (arXiv
2605.09649): attention that goes to useless tokens is lost, so a cache without them can be better than a full one. The
texts are RULER's with three other keys among essays, and one that has a needle in every sentence.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.evidence_attention import span_of
from experiments.retention import ANSWER_ROOM, MODEL, RETENTION, RIVALS
from experiments.runner import Dev, Essays, Out, split_of
from vestige import policies
from vestige.bench import items
from vestige.bench.config import BenchConfig
from vestige.bench.items import Item
from vestige.bench.methods import vestige_runner
from vestige.bench.metrics.scores import METRICS
from vestige.bench.results.aggregate import Record, Row, bootstrap_interval
from vestige.bench.tokenization import Renderer
from vestige.budget import Budget
from vestige.cache.attach import attach
from vestige.cache.prefill import announce, finish
from vestige.pipelines.explain import attention_to, share_of
from vestige.policies import Full
from vestige.policies.base import Policy

TASKS = ("ruler/niah_multikey_1", "ruler/niah_multikey_2")
METHODS = (RETENTION, RIVALS[0])
BUDGETS = ("0.75", "0.5", "0.25", "0.1")
LENGTH, SAMPLES = 1024, 50
COMMAND = "make results-dilution ESSAYS=DIR"


def measure(
    config: BenchConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    done: Callable[[str, int, int, dict[str, Any]], Any] = lambda *_: None,
) -> Iterator[Record]:
    """Yield what each method makes of each sample: scores, and shares of attention that go past the needle.

    Args:
        config: Which samples.
        model: Is asked.
        tokenizer: The model's.
        done: By task, length, number of the sample, and arm: whether that was measured. Attention is that of the
            question and the full cache's reply, so a sample is left out only if all its arms were.
    """
    made = {(name, budget): policies.make(name, Budget.parse(budget)) for name in METHODS for budget in BUDGETS}
    renderer = Renderer(tokenizer, model)
    for item in items.collect(config, renderer):
        task, length, index = item.sample.task, item.sample.length, item.sample.index
        if all(done(task, length, index, _arm(*one)) for one in made):
            continue
        turn = item.job.turns[0]
        at = span_of([renderer.text([token]) for token in turn.context], item.sample.turns[0].answers[0])
        assert at, "a needle's value stands in its text"
        needle = torch.arange(at.start, at.stop)
        with torch.no_grad(), attach(model):
            reading = vestige_runner.read(model, [item.job], list(made.values()))
            score_full, reply = _answered(renderer, item, Full(), reading)
            asked = torch.tensor([[*turn.question, *reply]])
            dilution_full = 1 - share_of(attention_to(model, reading.cache, asked, needle))
            for (name, budget), policy in made.items():
                cache = reading.ready_for(model, policy)[0].fork(policy)
                announce(cache, len(turn.context) + len(turn.question), 1)
                finish(model, cache, reading.ids)
                yield {
                    "task": task,
                    "length": length,
                    "index": index,
                    "arm": _arm(name, budget),
                    "score": _answered(renderer, item, policy, reading)[0],
                    "score_full": score_full,
                    "dilution": 1 - share_of(attention_to(model, cache, asked, needle)),
                    "dilution_full": dilution_full,
                }


def _arm(name: str, budget: str) -> dict[str, Any]:
    return {"policy": name, "share": None, "memory": "none", "budget": budget, "peer": None}


def _answered(
    renderer: Renderer, item: Item, policy: Policy, reading: vestige_runner.Reading
) -> tuple[float, list[int]]:
    (outcome,) = vestige_runner.run(renderer.model, [item.job], policy, reading=reading)
    reply, turn = outcome.replies[0], item.sample.turns[0]
    return METRICS[turn.metric](renderer.text(reply), turn), [token for token in reply if token not in item.job.stop]


def rows_of(records: Iterable[Record]) -> list[Row]:
    """Return by task, method and budget the mean scores and dilutions, and the gain over the full cache."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for one in records:
        groups.setdefault((one["task"], one["arm"]["policy"], one["arm"]["budget"]), []).append(one)
    rows = []
    for (task, method, budget), group in groups.items():
        gains = [one["score"] - one["score_full"] for one in group]
        means = {
            name: sum(one[name] for one in group) / len(group)
            for name in ("score", "score_full", "dilution", "dilution_full")
        }
        rows.append(
            {"task": task, "method": method, "budget": budget, "n": len(group)}
            | means
            | {"gain": sum(gains) / len(gains), "gain_ci95": bootstrap_interval(gains)}
        )
    return rows


def table(rows: Iterable[Row]) -> str:
    """Return Markdown of :func:`rows_of`."""
    lines = [
        "| task | method | budget | samples | full | score | gain | attention to the needle, full | kept |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        low, high = row["gain_ci95"]
        lines.append(
            f"| {row['task']} | {row['method']} | {row['budget']} | {row['n']} | {row['score_full']:.2f} "
            f"| {row['score']:.2f} | {row['gain']:+.2f} ({low:+.2f} to {high:+.2f}) "
            f"| {1 - row['dilution_full']:.2%} | {1 - row['dilution']:.2%} |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: Sequence[Row], task: str) -> str:
    """Return an SVG: by how much each method's score is above the full cache's, by budget."""
    from vestige.bench.report.methods import Method
    from vestige.bench.report.plots import Axis, Point, line_chart, lines_of

    drawn: dict[Method, list[Point]] = {}
    for row in rows:
        if row["task"] == task:
            point = Point(x=float(row["budget"]), y=row["gain"], interval=tuple(row["gain_ci95"]))
            share = "model"  # both methods' heads and layers compete
            drawn.setdefault(Method.of({"policy": row["method"], "share": share}), []).append(point)
    above = Axis(label="score above the full cache's", limits=(-0.6, 0.4))
    kept = Axis(label="share of the pairs kept", whole=True, percent=True)
    return line_chart(f"{task}, {LENGTH:,} tokens", lines_of(drawn), kept, above, legend=True)


def main(
    out: Out,
    essays: Essays = None,
    samples: Annotated[int, typer.Option(help="Of each task.")] = SAMPLES,
    dev: Dev = False,
) -> None:
    """Measure, or go on with it, print the table, and write it with its pictures."""
    from rich.progress import track

    from vestige.bench.results.store import Store
    from vestige.models.loading import load
    from vestige.utils.files import write_atomically

    config = BenchConfig(
        tasks=TASKS,
        methods=(),
        lengths=(LENGTH,),
        samples=samples,
        split=split_of(dev),
        answer_room=ANSWER_ROOM,
        essays=essays,
    )
    store = Store(out / "dilution", {"split": config.split, "length": LENGTH, "samples": samples}, resume=True)
    left = len(TASKS) * samples * len(METHODS) * len(BUDGETS) - len(store.records)
    for record in track(measure(config, *load(MODEL), done=store.has), "dilution", left):
        store.append(record)
    rows = rows_of(store.records.values())
    write_atomically(out / "dilution.json", json.dumps(rows, indent=1) + "\n")
    write_atomically(out / "dilution.md", f"# Dilution\n\nRemade by `{COMMAND}`.\n\n{table(rows)}")
    for task in TASKS:
        write_atomically(out / f"dilution-{task.rpartition('/')[2]}.svg", picture(rows, task))
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
