"""What eviction leaves of the attention that an answer pays to its evidence: finer than right or wrong.

``python -m vestige.recipes.evidence --essays DIR`` runs on the dev split, to choose by: of the attention that the full
cache's right answers pay to the needle, summed over layers and heads, the share whose pairs each method keeps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from vestige import policies
from vestige.attachment import attach
from vestige.bench import items, ours
from vestige.bench.config import BenchConfig
from vestige.bench.render import Renderer
from vestige.budget import Budget
from vestige.cache import KVCache
from vestige.recipes import laprox

TASKS = ("ruler/niah_single_2", "ruler/niah_single_3", "ruler/niah_multikey_1", "niah")
METHODS = tuple(
    f"{name}({pooling})"
    for pooling in ("kernel=7", "kernel=21", "kernel=31, causal=True", "kernel=41, causal=True")
    for name in ("snapkv", "laprox")
)
SAMPLES, PIECE = 5, 512


def span_of(words: Sequence[str], text: str) -> range:
    """Return which of the tokens' texts hold the first occurrence of a text; none if it is not there."""
    begin, at, found = "".join(words).find(text), 0, []
    for i, word in enumerate(words):
        if begin >= 0 and at < begin + len(text) and at + len(word) > begin:
            found.append(i)
        at += len(word)
    return range(found[0], found[-1] + 1) if found else range(0)


def attention_to(
    model: PreTrainedModel, ids: Sequence[int], reply: Sequence[int], span: range, kv_heads: int
) -> Float[Tensor, "layers kv_heads span"]:
    """Return what the tokens of a reply pay to a span, summed over them and over query groups.

    Args:
        model: With eager attention, which alone returns weights.
        ids: What was read.
        reply: What was said after it.
        span: Tokens of ``ids``.
        kv_heads: KV heads of every layer.
    """
    cache, text = DynamicCache(config=model.config), torch.tensor([list(ids)])
    for start in range(0, len(ids), PIECE):
        model(text[:, start : start + PIECE], past_key_values=cache)
    weights = model(torch.tensor([list(reply)]), past_key_values=cache, output_attentions=True).attentions
    paid = torch.stack([layer[0, :, :, span.start : span.stop].float().sum(1) for layer in weights])
    by_row: Tensor = paid.unflatten(1, (kv_heads, -1)).sum(2)
    return by_row


def kept_of(cache: KVCache, span: range) -> Bool[Tensor, "layers kv_heads span"]:
    """Return which pairs of a span a cache of one batch row still holds."""
    wanted = torch.arange(span.start, span.stop)
    return torch.stack(
        [
            torch.stack([torch.isin(wanted, layer.positions(row)) for row in range(layer.rows)])
            for layer in cache.evictable
        ]
    )


def measure(
    config: BenchConfig, load: tuple[PreTrainedModel, PreTrainedTokenizerBase], eager: PreTrainedModel
) -> Iterator[tuple[str, str, str, float]]:
    """Yield task, method, budget and the share of attention kept, for each sample that the full cache answers."""
    model, tokenizer = load
    for item in items.collect(config, Renderer(tokenizer, model, question_aware=True)):
        ids, answer = item.job.turns[0].context, item.sample.turns[0].answers[0]
        made = {(name, b): policies.make(name, Budget.parse(b)) for name in METHODS for b in laprox.BUDGETS}
        with torch.no_grad(), attach(model):
            reading = ours.read(model, [item.job], list(made.values()))
            (full,) = ours.run(model, [item.job], policies.Full(), reading=reading)
            span = span_of([str(tokenizer.decode([i])) for i in ids], answer)
            if answer not in tokenizer.decode(list(full.replies[0])) or not span:
                continue
            kv_heads = reading.cache.evictable[0].kv_heads
            paid = attention_to(eager, ids, full.replies[0], span, kv_heads)
            for (name, budget), policy in made.items():
                cache = reading.cache.fork(policy)
                cache.settle()
                yield item.sample.task, name, budget, float((paid * kept_of(cache, span)).sum() / paid.sum())


def main(
    essays: Annotated[Path | None, typer.Option(help="A folder of text files; default: online.")] = None,
    samples: Annotated[int, typer.Option(help="Of each task.")] = SAMPLES,
) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    from vestige.download import load

    config = replace(laprox.parts(essays, split="dev")["aware"].config, tasks=TASKS, samples=samples)
    pair, (eager, _) = load("smollm2-135m"), load("smollm2-135m")
    eager.set_attn_implementation("eager")
    shares: dict[tuple[str, str, str], list[float]] = {}
    for task, name, budget, share in measure(config, pair, eager):
        shares.setdefault((task, name, budget), []).append(share)
    table = Table("task", "method", *laprox.BUDGETS, "n")
    for task in TASKS:
        for name in METHODS:
            cells = [shares.get((task, name, budget), []) for budget in laprox.BUDGETS]
            table.add_row(task, name, *(f"{sum(c) / len(c):.2f}" if c else "-" for c in cells), str(len(cells[0])))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
