"""What eviction leaves of the attention that an answer pays to its evidence: finer than right or wrong.

``python -m experiments.evidence_attention --essays DIR`` runs on the dev split, to choose by: of the attention that the
full cache's right answers pay to the needle, summed over layers and heads, the share whose pairs each method keeps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments import laprox
from experiments.runner import Essays
from vestige import policies
from vestige.bench import items
from vestige.bench.config import BenchConfig
from vestige.bench.methods import vestige_runner
from vestige.bench.tokenization import Renderer
from vestige.budget import Budget
from vestige.cache.attach import attach
from vestige.pipelines.explain import attention_to, find_held, kept_attention

TASKS = ("ruler/niah_single_2", "ruler/niah_single_3", "ruler/niah_multikey_1", "niah")
METHODS = tuple(
    f"{name}({pooling})"
    for pooling in ("kernel=7", "kernel=21", "kernel=31, causal=True", "kernel=41, causal=True")
    for name in ("snapkv", "laprox")
)
SAMPLES = 5


def span_of(words: Sequence[str], text: str) -> range:
    """Return which of the tokens' texts hold the first occurrence of a text; none if it is not there."""
    begin, at, found = "".join(words).find(text), 0, []
    for i, word in enumerate(words):
        if begin >= 0 and at < begin + len(text) and at + len(word) > begin:
            found.append(i)
        at += len(word)
    return range(found[0], found[-1] + 1) if found else range(0)


def measure(
    config: BenchConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, str, str, float]]:
    """Yield task, method, budget and the share of attention kept, for each sample that the full cache answers."""
    for item in items.collect(config, Renderer(tokenizer, model, question_aware=True)):
        ids, answer = item.job.turns[0].context, item.sample.turns[0].answers[0]
        made = {(name, b): policies.make(name, Budget.parse(b)) for name in METHODS for b in laprox.BUDGETS}
        with torch.no_grad(), attach(model):
            reading = vestige_runner.read(model, [item.job], list(made.values()))
            (full,) = vestige_runner.run(model, [item.job], policies.Full(), reading=reading)
            reply, span = list(full.replies[0]), span_of([str(tokenizer.decode([i])) for i in ids], answer)
            if answer not in tokenizer.decode(reply) or not span:
                continue
            needle = torch.tensor(span)
            paid = attention_to(model, reading.cache, torch.tensor([reply]), needle)
            for (name, budget), policy in made.items():
                cache = reading.cache.fork(policy)
                cache.settle()
                yield item.sample.task, name, budget, kept_attention(paid, find_held(cache, needle))


def main(
    essays: Essays = None,
    samples: Annotated[int, typer.Option(help="Of each task.")] = SAMPLES,
) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    from vestige.models.loading import load

    config = replace(laprox.parts(essays, split="dev")["aware"].config, tasks=TASKS, samples=samples)
    shares: dict[tuple[str, str, str], list[float]] = {}
    for task, name, budget, share in measure(config, *load("smollm2-135m")):
        shares.setdefault((task, name, budget), []).append(share)
    table = Table("task", "method", *laprox.BUDGETS, "n")
    for task in TASKS:
        for name in METHODS:
            cells = [shares.get((task, name, budget), []) for budget in laprox.BUDGETS]
            table.add_row(task, name, *(f"{sum(c) / len(c):.2f}" if c else "-" for c in cells), str(len(cells[0])))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
