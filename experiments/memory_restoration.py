"""What an eviction takes from attention, and how much of it each memory gives back: why a memory helps, or does not.

``make results-restored ESSAYS=DIR`` measures it, layer by layer: the queries of a question read all pairs, those that
are left, and those that are left with a memory of the others. Nothing is added up over layers as it is in an answer.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.indexmem import FRACTIONS, LONG, MEMORIES, MODEL, REMEMBERING, TASKS
from experiments.runner import Dev, Essays, Out, split_of
from vestige import memory
from vestige.bench import items
from vestige.bench.config import BenchConfig
from vestige.bench.methods import vestige_runner
from vestige.bench.methods.method import cross
from vestige.bench.results.aggregate import Record, Row, bootstrap_interval
from vestige.bench.tokenization import Renderer
from vestige.cache.attach import attach
from vestige.cache.kv_cache import KVCache
from vestige.cache.prefill import announce, finish
from vestige.cli.options import Dtype
from vestige.kernels.merge import PartialAttention
from vestige.models.anatomy import check
from vestige.pipelines.explain import held_of
from vestige.training.indexmem.memory_loss import attended, rejoined
from vestige.training.indexmem.teacher_trace import Layer, seen

METHODS = (*REMEMBERING, "random")
SAMPLES = 5
COMMAND = "make results-restored ESSAYS=DIR"
_SMALL = 1e-12


def measure(
    config: BenchConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    known: Callable[[str, int, int, dict[str, Any], str, str], Any] = lambda *_: None,
) -> Iterator[Record]:
    """Yield for each sample and arm the attention that went with the evicted, and the error of what is left.

    Args:
        config: Which samples and arms.
        model: Is asked.
        tokenizer: The model's.
        known: By task, length, number of the sample, arm, digest of the sample, and of the arm's trained weights:
            whether that was measured.
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
        layers = seen(model, torch.tensor([[*turn.context, *turn.question]], device=model.device))
        whole = [attended(layer, text, _all(layer, text)) for layer in layers]
        made = {arm: arm.make_policy(seed=config.seed) for arm in left}
        with torch.no_grad(), attach(model):
            reading = vestige_runner.read(model, [item.job], list(dict.fromkeys(made.values())))
            for arm, policy in made.items():
                cache = reading.ready_for(model, policy)[0].fork(policy, memory=memory.make(arm.memory))
                announce(cache, text + len(turn.question), 1)
                finish(model, cache, reading.ids)
                yield {
                    "task": task,
                    "length": length,
                    "index": index,
                    "arm": arm.key,
                    "digest": item.digest,
                    "trained": trained[arm],
                    **_compared(cache, layers, whole, text),
                }


def _all(layer: Layer, text: int) -> Tensor:
    return torch.ones(len(layer.keys), text, dtype=torch.bool, device=layer.keys.device)


def _compared(cache: KVCache, layers: list[Layer], whole: list[PartialAttention], text: int) -> dict[str, float]:
    """Return the share of attention that went with the evicted, and the error of attention's output as a share of its
    size, the mean over layers."""
    lost, errors = [], []
    for own, held, layer, exact in zip(cache.evictable, held_of(cache, torch.arange(text)), layers, whole, strict=True):
        left = attended(layer, text, held.to(layer.keys.device))
        output = left.output if own.remains is None else rejoined(left, own.remains, layer, text)
        lost.append(1 - (left.lse - exact.lse).exp().mean())
        errors.append((output - exact.output).square().mean() / exact.output.square().mean().clamp_min(_SMALL))
    return {"lost": float(torch.stack(lost).mean()), "error": float(torch.stack(errors).mean())}


def rows_of(records: Iterable[Record]) -> list[Row]:
    """Return by policy and budget what is lost, the error with no memory, and what each memory leaves of that."""
    cells: dict[tuple[str, str], dict[str, dict[tuple[str, int], Record]]] = {}
    for one in records:
        arm = one["arm"]
        cell = cells.setdefault((arm["policy"], arm["budget"]), {})
        cell.setdefault(arm["memory"], {})[one["task"], one["index"]] = one
    rows = []
    for (policy, budget), found in cells.items():
        plain = found.get("none", {})
        for kind, with_memory in found.items():
            if both := [(one, plain[key]) for key, one in with_memory.items() if key in plain]:
                left = [one["error"] / max(other["error"], _SMALL) for one, other in both]
                means = {name: sum(one[name] for one, _ in both) / len(both) for name in ("lost", "error")}
                row = {"policy": policy, "budget": budget, "memory": kind, "n": len(both), **means}
                rows.append(row | {"left": sum(left) / len(left), "left_ci95": bootstrap_interval(left)})
    return rows


def table(rows: Iterable[Row]) -> str:
    """Return Markdown of :func:`rows_of`: a line for each policy and budget, a column for each memory."""
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row["policy"], row["budget"]), {})[row["memory"]] = row
    kinds = [kind for kind in MEMORIES if kind != "none"]
    said = [
        f"| policy | budget | attention lost | error | left of it with {' | '.join(kinds)} |",
        f"| --- | ---: | ---: | ---: |{' ---: |' * len(kinds)}",
    ]
    for (policy, budget), found in lines.items():
        plain = found["none"]
        cells = [_share(found[kind]) if kind in found else "" for kind in kinds]
        said.append(f"| {policy} | {budget} | {plain['lost']:.1%} | {plain['error']:.3f} | {' | '.join(cells)} |")
    return "\n".join(said) + "\n"


def _share(row: Row) -> str:
    low, high = row["left_ci95"]
    return f"{row['left']:.0%} ({low:.0%} to {high:.0%})"


def compared(essays: Path | None = None, split: str = "test") -> BenchConfig:
    """Return the samples and arms: all hold as many pairs, memories come on top."""
    return BenchConfig(
        tasks=TASKS[1:3],
        methods=cross(METHODS, FRACTIONS, memories=MEMORIES),
        lengths=(LONG,),
        samples=SAMPLES,
        split=split,
        essays=essays,
    )


def main(out: Out, essays: Essays = None, dev: Dev = False, dtype: Dtype = None) -> None:
    """Measure, or go on with it, print the table, and write it."""
    from rich.progress import track

    from vestige.bench.results.store import Store
    from vestige.models.loading import load
    from vestige.utils.files import write_atomically

    config, (model, tokenizer) = compared(essays, split_of(dev)), load(MODEL, dtype=dtype)
    books = {"split": config.split, "length": LONG, "samples": SAMPLES, "dtype": str(model.dtype)}
    books |= {"weights": check(model).fingerprint()}
    store = Store(out / "restored", books, resume=True)
    left = len(config.tasks) * SAMPLES * len(config.methods) - len(store.records)
    for record in track(measure(config, model, tokenizer, known=store.known), "restored", left):
        store.append(record)
    rows = rows_of(store.records.values())
    write_atomically(out / "restored.json", json.dumps(rows, indent=1) + "\n")
    write_atomically(out / "restored.md", f"# What memories give back\n\nRemade by `{COMMAND}`.\n\n{table(rows)}")
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
