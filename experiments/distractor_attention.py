"""Eviction against the full cache among distractors: answers, and attention to the needle, before and after.

``python -m experiments dilution --essays DIR`` starts or resumes it. Source of the claim: "Make Each Token Count",
arXiv 2605.09649: attention to useless tokens is lost, so a cache without them can be better than a full one. The texts
are RULER's: one with three other keys among essays, and one with a needle in every sentence.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments import runner
from experiments.retention import ANSWER_ROOM, MODEL, RETENTION, RIVALS
from experiments.runner import Dev, Essays, Out
from vestige import policies
from vestige.bench import items
from vestige.bench.config import BenchConfig
from vestige.bench.items import Item
from vestige.bench.methods import vestige_runner
from vestige.bench.metrics.scores import METRICS
from vestige.bench.report.tables import format_markdown
from vestige.bench.results.aggregate import Record, Row, bootstrap_interval
from vestige.bench.tokenization import Renderer
from vestige.budget import Budget
from vestige.cache.attach import attach
from vestige.cache.prefill import finish
from vestige.pipelines.explain import attention_to, mean_attention
from vestige.policies import Full
from vestige.policies.base import Policy

TASKS = ("ruler/niah_multikey_1", "ruler/niah_multikey_2")
METHODS = (RETENTION, RIVALS[0])
BUDGETS = ("0.75", "0.5", "0.25", "0.1")
LENGTH, SAMPLES = 1024, 50
COMMAND = 'make results NAME=dilution ARGS="--essays DIR"'


def find_span(words: Sequence[str], text: str) -> range:
    """Return the tokens that hold the first occurrence of a text, or an empty range.

    Args:
        words: Text of each token.
        text: To find.
    """
    begin, at, found = "".join(words).find(text), 0, []
    for i, word in enumerate(words):
        if begin >= 0 and at < begin + len(text) and at + len(word) > begin:
            found.append(i)
        at += len(word)
    return range(found[0], found[-1] + 1) if found else range(0)


def measure(
    config: BenchConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    done: Callable[[str, int, int, dict[str, Any]], Any] = lambda *_: None,
) -> Iterator[Record]:
    """Yield a record of each sample and method: scores, and shares of attention that miss the needle.

    Args:
        config: The samples.
        model: Answers the questions.
        tokenizer: The model's.
        done: Tells by task, length, sample and arm what was measured. Attention is that of the question and the full
            cache's reply, so a sample is skipped only if all its arms are done.
    """
    made = {(name, budget): policies.make(name, Budget.parse(budget)) for name in METHODS for budget in BUDGETS}
    renderer = Renderer(tokenizer, model)
    for item in items.collect(config, renderer):
        task, length, index = item.sample.task, item.sample.length, item.sample.index
        if all(done(task, length, index, _make_arm(*key)) for key in made):
            continue
        turn = item.job.turns[0]
        span = find_span([renderer.text([token]) for token in turn.context], item.sample.turns[0].answers[0])
        assert span, "a needle's value stands in its text"
        needle = torch.arange(span.start, span.stop)
        with torch.no_grad(), attach(model):
            reading = vestige_runner.read(model, [item.job], list(made.values()))
            score_full, reply = _answer(renderer, item, Full(), reading)
            queries = torch.tensor([[*turn.question, *reply]])
            dilution_full = 1 - mean_attention(attention_to(model, reading.cache, queries, needle))
            for (name, budget), policy in made.items():
                cache = reading.ready_for(model, policy)[0].fork(policy)
                cache.state.announce(len(turn.context) + len(turn.question), 1)
                finish(model, cache, reading.ids)
                yield {
                    "task": task,
                    "length": length,
                    "index": index,
                    "arm": _make_arm(name, budget),
                    "score": _answer(renderer, item, policy, reading)[0],
                    "score_full": score_full,
                    "dilution": 1 - mean_attention(attention_to(model, cache, queries, needle)),
                    "dilution_full": dilution_full,
                }


def _make_arm(name: str, budget: str) -> dict[str, Any]:
    return {"policy": name, "share": None, "memory": "none", "budget": budget, "peer": None}


def _answer(renderer: Renderer, item: Item, policy: Policy, reading: vestige_runner.Reading) -> tuple[float, list[int]]:
    (outcome,) = vestige_runner.run(renderer.model, [item.job], policy, reading=reading)
    reply, turn = outcome.replies[0], item.sample.turns[0]
    return METRICS[turn.metric](renderer.text(reply), turn), [token for token in reply if token not in item.job.stop]


def aggregate_records(records: Iterable[Record]) -> list[Row]:
    """Return rows of task, method and budget: mean scores and dilutions, and the gain over the full cache."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        arm = record["arm"]
        groups.setdefault((record["task"], arm["policy"], arm["budget"]), []).append(record)
    rows = []
    for (task, method, budget), group in groups.items():
        gains = [record["score"] - record["score_full"] for record in group]
        means = {
            name: sum(record[name] for record in group) / len(group)
            for name in ("score", "score_full", "dilution", "dilution_full")
        }
        rows.append(
            {"task": task, "method": method, "budget": budget, "n": len(group)}
            | means
            | {"gain": sum(gains) / len(gains), "gain_ci95": bootstrap_interval(gains)}
        )
    return rows


def format_table(rows: Iterable[Row]) -> str:
    """Return Markdown of :func:`aggregate_records`."""
    lines = [
        [
            *(row["task"], row["method"], row["budget"], str(row["n"])),
            *(f"{row['score_full']:.2f}", f"{row['score']:.2f}", runner.format_interval(row["gain"], row["gain_ci95"])),
            *(f"{1 - row['dilution_full']:.2%}", f"{1 - row['dilution']:.2%}"),
        ]
        for row in rows
    ]
    columns = ("task", "method", "budget", "samples", "full", "score", "gain", "attention to the needle, full", "kept")
    return format_markdown(columns, lines, words=("task", "method"))


def draw_gains(rows: Sequence[Row], task: str) -> str:
    """Return the SVG of each method's gain over the full cache, by budget."""
    from vestige.bench.report.lines import make_lines
    from vestige.bench.report.methods import MethodKey
    from vestige.bench.report.plots import Axis, Point, draw_line_chart

    drawn: dict[MethodKey, list[Point]] = {}
    for row in rows:
        if row["task"] == task:
            point = Point(x=float(row["budget"]), y=row["gain"], interval=tuple(row["gain_ci95"]))
            share = "model"  # both methods' heads and layers compete
            drawn.setdefault(MethodKey.of({"policy": row["method"], "share": share}), []).append(point)
    above = Axis(label="score above the full cache's", limits=(-0.6, 0.4))
    kept = Axis(label="share of the pairs kept", whole=True, percent=True)
    return draw_line_chart(f"{task}, {LENGTH:,} tokens", make_lines(drawn), kept, above, legend=True)


def main(
    out: Out = None,
    essays: Essays = None,
    samples: Annotated[int, typer.Option(help="Of each task.")] = SAMPLES,
    dev: Dev = False,
) -> None:
    """Measure, or resume that, print the table, and write it with its pictures."""
    from rich.progress import track

    from vestige.bench.results.store import Store
    from vestige.models.loading import load
    from vestige.utils.files import write_atomically

    folder = runner.choose_folder(out, "dilution", results="retention", dev=dev)
    config = BenchConfig(
        tasks=TASKS,
        methods=(),
        lengths=(LENGTH,),
        samples=samples,
        split=runner.choose_split(dev),
        answer_room=ANSWER_ROOM,
        essays=essays,
    )
    store = Store(folder / "dilution", {"split": config.split, "length": LENGTH, "samples": samples}, resume=True)
    left = len(TASKS) * samples * len(METHODS) * len(BUDGETS) - len(store.records)
    for record in track(measure(config, *load(MODEL), done=store.find), "dilution", left):
        store.append(record)
    rows = runner.update_rows(folder / "dilution.json", aggregate_records(store.records.values()))
    runner.write_summary(folder / "dilution.md", "Dilution", COMMAND, format_table(rows))
    for task in TASKS:
        write_atomically(folder / f"dilution-{task.rpartition('/')[2]}.svg", draw_gains(rows, task))
    print(format_table(rows))
