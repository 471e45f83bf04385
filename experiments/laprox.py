"""LaProx against the methods that its paper compares with, at equal budgets, question-aware and question-agnostic.

``python -m experiments laprox --essays DIR --longbench DIR`` starts or resumes it. Options chosen by scores were chosen
on the dev split (``--dev``). All methods that observe the latest queries observe 32 and pool alike. The papers pool
over 7 tokens around each, too few for this model, which writes a number digit by digit; question-aware, SnapKV and
LaProx also run with 7, and with 21.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments import runner
from experiments.runner import Dev, Essays, Out, Parts
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
"""Changes of laprox, one at a time: who competes, raw scores, pinned sinks, a tenth for boundary tokens, ..."""
ABLATED_TASKS = ("ruler/niah_single_2", "ruler/niah_multikey_1")
SAMPLES, KVZIP_SAMPLES, ANSWER_ROOM, LENGTH = 20, 10, 16, 2048
COMMAND = 'make results NAME=laprox ARGS="--essays DIR --longbench DIR"'
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the runs: a model and its benchmark."""

    config: BenchConfig
    model: str = "smollm2-135m"


def make_parts(essays: Path | None = None, longbench: Path | None = None, split: str = "test") -> dict[str, Part]:
    """Return the runs by name, those that are judged first."""
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


def measure_losses(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each method's score over all tasks by budget, and its loss against the full cache on the same samples.

    ``of_snapkv`` is the loss as a share of SnapKV's. 95 % intervals come from resampling the samples.

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
                "score": _average([cell[key] for key in shared]),
                "score_ci95": _resample([cell[key] for key in shared], [1.0] * len(shared)),
                "loss": _average(own),
                "of_snapkv": _find_ratio(own, snapkv),
                "of_snapkv_ci95": _resample(own, snapkv),
            }
        )
    return rows


def draw_scores(rows: Iterable[Mapping[str, Any]], title: str) -> dict[str, str]:
    """Return the SVG of all scores for each budget, the full cache as a line; labels leave the common pooling out.

    Args:
        rows: Of :func:`measure_losses`.
        title: Heading of the pictures, which the budget follows.
    """
    from vestige.bench.report.methods import MethodKey, assign_styles
    from vestige.bench.report.plots import Line, Point, draw_dot_chart

    drawn: dict[str, dict[MethodKey, Mapping[str, Any]]] = {}
    for row in rows:
        drawn.setdefault(row["budget"], {})[MethodKey.of(row)] = row
    made = {}
    for budget, found in drawn.items():
        best = sorted(found, key=lambda method: -found[method]["score"])
        styles = assign_styles(best)
        points = {m: Point(x=0, y=found[m]["score"], interval=tuple(found[m]["score_ci95"])) for m in best}
        lines = [Line(label=m.label.replace(f"({POOLING})", ""), style=styles[m], points=(points[m],)) for m in best]
        notes = [f"loses {found[m]['loss']:+.2f}" for m in best]
        full = Point(x=0, y=found[best[0]]["score"] + found[best[0]]["loss"])
        made[budget] = draw_dot_chart(f"{title}, budget {budget}", lines, notes, level=full)
    return made


def _average(values: Sequence[float | int]) -> float:
    return sum(values) / len(values)


def _find_ratio(own: Sequence[float | int], other: Sequence[float | int]) -> float | None:
    return sum(own) / sum(other) if sum(other) > 0 else None


def _resample(own: Sequence[float | int], other: Sequence[float | int]) -> tuple[float, float] | None:
    draw = random.Random(0)
    found = []
    for _ in range(RESAMPLES):
        picked = draw.choices(range(len(own)), k=len(own))
        ratio = _find_ratio([own[i] for i in picked], [other[i] for i in picked])
        if ratio is not None:
            found.append(ratio)
    found.sort()
    return (found[len(found) // 40], found[-1 - len(found) // 40]) if found else None


def main(
    out: Out = None,
    essays: Essays = None,
    longbench: Annotated[Path | None, typer.Option(help="A folder with multi_news.jsonl; default: online.")] = None,
    part: Parts = None,
    dev: Dev = False,
) -> None:
    """Run the comparison, or resume it, part by part, and write its report."""
    out = runner.choose_folder(out, "laprox", dev=dev)
    for name, run in runner.select_parts(make_parts(essays, longbench, runner.choose_split(dev)), part).items():
        folder = out / name
        runner.run_bench(run.config, folder, model=run.model, command=COMMAND, label=name)
        found = measure_losses(runner.read_records(folder))
        (folder / "losses.json").write_text(json.dumps(found, indent=1) + "\n")
        for budget, picture in draw_scores(found, f"{run.model}, {name}").items():
            (folder / f"scores-{budget}.svg").write_text(picture)
    if not dev:
        runner.write_report(out)
