"""The attention that an eviction loses, and the part of it that each memory restores: why a memory helps, or does not.

``python -m experiments restored --essays DIR`` measures it layer by layer: the queries of a question read all pairs,
the kept pairs, and the kept pairs with a memory of the others. Unlike in an answer, errors do not add up over layers.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments import runner
from experiments.indexmem import FRACTIONS, LONG, MEMORIES, MODEL, REMEMBERING, TASKS
from experiments.runner import Dev, Essays, Out
from vestige import memory
from vestige.bench import items
from vestige.bench.config import BenchConfig
from vestige.bench.methods import vestige_runner
from vestige.bench.methods.method import cross
from vestige.bench.report.tables import format_markdown
from vestige.bench.results.aggregate import Record, Row, bootstrap_interval
from vestige.bench.tokenization import Renderer
from vestige.cache.attach import attach
from vestige.cache.kv_cache import KVCache
from vestige.cache.prefill import finish
from vestige.cli.options import Dtype
from vestige.kernels.merge import PartialAttention
from vestige.models.layout import check
from vestige.pipelines.explain import find_held
from vestige.training.indexmem.memory_loss import attend_to_pairs, attend_with_memory
from vestige.training.indexmem.teacher_trace import LayerTrace, trace_text

METHODS = (*REMEMBERING, "random")
SAMPLES = 5
COMMAND = 'make results NAME=restored ARGS="--essays DIR"'
_SMALL = 1e-12


def measure(
    config: BenchConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    known: Callable[[str, int, int, dict[str, Any], str, str], Any] = lambda *_: None,
) -> Iterator[Record]:
    """Yield a record of each sample and arm: the attention to evicted pairs, and the error of the output without them.

    Args:
        config: The samples and arms.
        model: Answers the questions.
        tokenizer: The model's.
        known: Tells by task, length, sample, arm, digest of the sample, and of the arm's trained weights what was
            measured.
    """
    renderer = Renderer(tokenizer, model)
    trained = {arm: arm.weights(model) for arm in config.methods}
    for item in items.collect(config, renderer):
        task, length, index = item.sample.task, item.sample.length, item.sample.index
        left = [arm for arm in config.methods if not known(task, length, index, arm.key, item.digest, trained[arm])]
        if not left:
            continue
        turn = item.job.turns[0]
        text = len(turn.context)
        layers = trace_text(model, torch.tensor([[*turn.context, *turn.question]], device=model.device))
        whole = [attend_to_pairs(layer, text, _select_all(layer, text)) for layer in layers]
        made = {arm: arm.make_policy(seed=config.seed) for arm in left}
        with torch.no_grad(), attach(model):
            reading = vestige_runner.read(model, [item.job], list(dict.fromkeys(made.values())))
            for arm, policy in made.items():
                cache = reading.ready_for(model, policy)[0].fork(policy, memory=memory.make(arm.memory))
                cache.state.announce(text + len(turn.question), 1)
                finish(model, cache, reading.ids)
                yield {
                    "task": task,
                    "length": length,
                    "index": index,
                    "arm": arm.key,
                    "digest": item.digest,
                    "trained": trained[arm],
                    **_measure_error(cache, layers, whole, text),
                }


def _select_all(layer: LayerTrace, text: int) -> Tensor:
    return torch.ones(len(layer.keys), text, dtype=torch.bool, device=layer.keys.device)


def _measure_error(
    cache: KVCache, layers: list[LayerTrace], whole: list[PartialAttention], text: int
) -> dict[str, float]:
    """Return means over layers: the share of attention to evicted pairs, and the output's relative squared error."""
    lost, errors = [], []
    kept = find_held(cache, torch.arange(text))
    for cached, held, layer, exact in zip(cache.evictable, kept, layers, whole, strict=True):
        left = attend_to_pairs(layer, text, held.to(layer.keys.device))
        output = left.output if cached.remains is None else attend_with_memory(left, cached.remains, layer, text)
        lost.append(1 - (left.lse - exact.lse).exp().mean())
        errors.append((output - exact.output).square().mean() / exact.output.square().mean().clamp_min(_SMALL))
    return {"lost": float(torch.stack(lost).mean()), "error": float(torch.stack(errors).mean())}


def aggregate_records(records: Iterable[Record]) -> list[Row]:
    """Return rows of policy, budget and memory: attention lost, error, and the error as a share of that without."""
    cells: dict[tuple[str, str], dict[str, dict[tuple[str, int], Record]]] = {}
    for record in records:
        arm = record["arm"]
        cell = cells.setdefault((arm["policy"], arm["budget"]), {})
        cell.setdefault(arm["memory"], {})[record["task"], record["index"]] = record
    rows = []
    for (policy, budget), found in cells.items():
        plain = found.get("none", {})
        for kind, with_memory in found.items():
            if both := [(record, plain[key]) for key, record in with_memory.items() if key in plain]:
                left = [record["error"] / max(without["error"], _SMALL) for record, without in both]
                means = {name: sum(record[name] for record, _ in both) / len(both) for name in ("lost", "error")}
                row = {"policy": policy, "budget": budget, "memory": kind, "n": len(both), **means}
                rows.append(row | {"left": sum(left) / len(left), "left_ci95": bootstrap_interval(left)})
    return rows


def format_table(rows: Iterable[Row]) -> str:
    """Return Markdown of :func:`aggregate_records`: a line for each policy and budget, a column for each memory."""
    arms: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        arms.setdefault((row["policy"], row["budget"]), {})[row["memory"]] = row
    first, *kinds = (kind for kind in MEMORIES if kind != "none")
    lines = []
    for (policy, budget), found in arms.items():
        left = [
            runner.format_interval(found[kind]["left"], found[kind]["left_ci95"], ".0%") if kind in found else ""
            for kind in (first, *kinds)
        ]
        plain = found["none"]
        lines.append([policy, budget, f"{plain['lost']:.1%}", f"{plain['error']:.3f}", *left])
    columns = ("policy", "budget", "attention lost", "error", f"left of it with {first}", *kinds)
    return format_markdown(columns, lines, words=("policy",))


def make_comparison(essays: Path | None = None, split: str = "test") -> BenchConfig:
    """Return the run: all arms of a budget hold the same number of pairs, memories come on top."""
    return BenchConfig(
        tasks=TASKS[1:3],
        methods=cross(METHODS, FRACTIONS, memories=MEMORIES),
        lengths=(LONG,),
        samples=SAMPLES,
        split=split,
        essays=essays,
    )


def main(out: Out = None, essays: Essays = None, dev: Dev = False, dtype: Dtype = None) -> None:
    """Measure, or resume that, print the table, and write it."""
    from rich.progress import track

    from vestige.bench.results.store import Store
    from vestige.models.loading import load

    folder = runner.choose_folder(out, "restored", results="indexmem", dev=dev)
    config = make_comparison(essays, runner.choose_split(dev))
    model, tokenizer = load(MODEL, dtype=dtype)
    books = {"split": config.split, "length": LONG, "samples": SAMPLES, "dtype": str(model.dtype)}
    books |= {"weights": check(model).fingerprint()}
    store = Store(folder / "restored", books, resume=True)
    left = len(config.tasks) * SAMPLES * len(config.methods) - len(store.records)
    for record in track(measure(config, model, tokenizer, known=store.find), "restored", left):
        store.append(record)
    rows = runner.update_rows(folder / "restored.json", aggregate_records(store.records.values()))
    runner.write_summary(folder / "restored.md", "What memories give back", COMMAND, format_table(rows))
    print(format_table(rows))
