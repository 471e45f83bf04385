"""LaProx against the methods that its paper compares with, at equal budgets, question-aware and question-agnostic.

``make results-laprox ESSAYS=DIR LONGBENCH=DIR`` runs it, and goes on with what is there after an interrupt. What was
chosen by looking at scores was chosen on the dev split (``make results-laprox-dev``). All methods that look at the
latest queries look at 32 and pool alike. The papers pool over 7 tokens around each, too few for this model, which
writes a number digit by digit; with the question read first, SnapKV and LaProx also run with that, and with 21.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.runner import Dev, Essays, Out, Parts, benched, chosen, records_of, split_of
from vestige.bench.config import BenchConfig
from vestige.bench.methods.method import Method, cross

TASKS = ("ruler/niah_single_1", "ruler/niah_single_2", "ruler/niah_single_3", "ruler/niah_multikey_1", "niah")
"""The four RULER tasks that the full cache answers best on the dev split at 2,048 tokens, and needles by depth."""
BUDGETS = ("0.25", "0.1", "0.05")
POOLING = "kernel=41, causal=True"
"""Of every method that pools: on the dev split SnapKV did best with it, of 21 around and 21, 31 and 41 causal."""
METHODS = ("snapkv", "laprox", "adakv", "pyramidkv", "criticalkv")
OTHERWISE = ("snapkv(kernel=21)", "laprox(kernel=21)", "snapkv(kernel=7)", "laprox(kernel=7)")
"""The same question with other poolings, the last one the papers'."""
RIVAL = f"snapkv({POOLING})"
CONTROLS = ("full", "random", "streaming_llm")
QUESTION_AGNOSTIC = ("keydiff",)
ABLATIONS = (
    "share=layer",
    "share=head",
    "scale=calibrated",
    "sink=4",
    "first_share=0.05, recent_share=0.05",
    "window=8",
    "observed=8",
)
"""What is changed in laprox, one at a time: who competes, raw scores, pinned sinks, a tenth for boundary tokens, ..."""
ABLATED_TASKS = ("ruler/niah_single_2", "ruler/niah_multikey_1")
SAMPLES, KVZIP_SAMPLES, ANSWER_ROOM, LENGTH = 20, 10, 16, 2048
COMMAND = "make results-laprox ESSAYS=DIR LONGBENCH=DIR"
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the runs: a model and what is measured on it."""

    config: BenchConfig
    model: str = "smollm2-135m"


def parts(essays: Path | None = None, longbench: Path | None = None, split: str = "test") -> dict[str, Part]:
    """Return the runs by name, the judged ones first."""
    pooling = tuple(f"{name}({POOLING})" for name in METHODS)
    ablated = tuple(f"laprox({POOLING}, {change})" for change in ABLATIONS)
    arms = cross((*CONTROLS, *pooling), BUDGETS)
    slow = tuple(Method(policy="kvzip", share="model", budget=budget, samples=KVZIP_SAMPLES) for budget in BUDGETS)
    common: dict[str, Any] = {"samples": SAMPLES, "split": split, "essays": essays}
    needles = common | {"lengths": (LENGTH,), "answer_room": ANSWER_ROOM}
    agnostic = (*arms, *cross(QUESTION_AGNOSTIC, BUDGETS), *slow)
    return {
        "aware": Part(
            config=BenchConfig(tasks=TASKS, methods=(*arms, *cross(OTHERWISE, BUDGETS)), question_aware=True, **needles)
        ),
        "agnostic": Part(config=BenchConfig(tasks=TASKS, methods=agnostic, **needles)),
        "multi_news": Part(
            config=BenchConfig(
                tasks=("longbench/multi_news",), methods=arms, question_aware=True, longbench=longbench, **common
            )
        ),
        "ablations": Part(
            config=BenchConfig(
                tasks=ABLATED_TASKS,
                methods=cross(("full", *pooling[:2], *ablated), BUDGETS),
                question_aware=True,
                **needles,
            )
        ),
        "gemma": Part(
            config=BenchConfig(tasks=ABLATED_TASKS, methods=arms, question_aware=True, **needles), model="gemma3-270m"
        ),
    }


def losses(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what each method scores, and loses against the full cache on the same samples, by budget, over all tasks.

    ``of_snapkv`` is the loss as a share of SnapKV's. Intervals, 95 %, are by resampling samples.

    Args:
        records: Of one part.
    """
    scores: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    for record in records:
        arm = record["arm"]
        cell = scores.setdefault((arm["policy"], arm["budget"]), {})
        cell[record["task"], record["index"]] = record["score"]
    full = scores["full", "1.0"]
    rows = []
    for (policy, budget), cell in scores.items():
        rival = scores.get((RIVAL, budget), {})
        shared = sorted(cell.keys() & full.keys() & rival.keys())
        if policy == "full" or not shared:
            continue
        own = [full[key] - cell[key] for key in shared]
        snapkv = [full[key] - rival[key] for key in shared]
        rows.append(
            {
                "policy": policy,
                "budget": budget,
                "n": len(shared),
                "score": _mean([cell[key] for key in shared]),
                "score_ci95": _interval([cell[key] for key in shared], [1.0] * len(shared)),
                "loss": _mean(own),
                "of_snapkv": _ratio(own, snapkv),
                "of_snapkv_ci95": _interval(own, snapkv),
            }
        )
    return rows


def pictures(rows: Iterable[Mapping[str, Any]], title: str) -> dict[str, str]:
    """Return an SVG for each budget: what each method scores, the full cache as a line. Common pooling goes unsaid.

    Args:
        rows: Of :func:`losses`.
        title: Stands above; the budget follows it.
    """
    from vestige.bench.report.methods import Method, looks
    from vestige.bench.report.plots import Line, Point, dot_chart

    drawn: dict[str, dict[Method, Mapping[str, Any]]] = {}
    for row in rows:
        drawn.setdefault(row["budget"], {})[Method.of(row)] = row
    made = {}
    for budget, found in drawn.items():
        best = sorted(found, key=lambda method: -found[method]["score"])
        look = looks(best)
        points = {m: Point(x=0, y=found[m]["score"], interval=tuple(found[m]["score_ci95"])) for m in best}
        lines = [Line(label=m.label.replace(f"({POOLING})", ""), look=look[m], points=(points[m],)) for m in best]
        notes = [f"loses {found[m]['loss']:+.2f}" for m in best]
        full = Point(x=0, y=found[best[0]]["score"] + found[best[0]]["loss"])
        made[budget] = dot_chart(f"{title}, budget {budget}", lines, notes, level=full)
    return made


def _mean(values: Sequence[float | int]) -> float:
    return sum(values) / len(values)


def _ratio(own: Sequence[float | int], other: Sequence[float | int]) -> float | None:
    return sum(own) / sum(other) if sum(other) > 0 else None


def _interval(own: Sequence[float | int], other: Sequence[float | int]) -> tuple[float, float] | None:
    draw = random.Random(0)
    found = []
    for _ in range(RESAMPLES):
        picked = draw.choices(range(len(own)), k=len(own))
        ratio = _ratio([own[i] for i in picked], [other[i] for i in picked])
        if ratio is not None:
            found.append(ratio)
    found.sort()
    return (found[len(found) // 40], found[-1 - len(found) // 40]) if found else None


def main(
    out: Out,
    essays: Essays = None,
    longbench: Annotated[Path | None, typer.Option(help="A folder with multi_news.jsonl; default: online.")] = None,
    part: Parts = None,
    dev: Dev = False,
) -> None:
    """Run the comparison, or go on with it, part by part."""
    for name, run in chosen(parts(essays, longbench, split_of(dev)), part).items():
        folder = out / name
        benched(run.config, folder, model=run.model, command=COMMAND, label=name)
        found = losses(records_of(folder))
        (folder / "losses.json").write_text(json.dumps(found, indent=1) + "\n")
        for budget, picture in pictures(found, f"{run.model}, {name}").items():
            (folder / f"scores-{budget}.svg").write_text(picture)


if __name__ == "__main__":
    typer.run(main)
