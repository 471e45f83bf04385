"""The main job on the default model and a shipped document, as a show."""

from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from vestige import show as shows
from vestige.download import load
from vestige.run import RunConfig, RunResult, run

MODEL, POLICY, SHARE, BUDGET, CHUNK = "smollm2-135m", "keydiff", "model", "0.5", 1024
DOCUMENT = "harbour.txt"
QUESTIONS = (
    "What is the pass phrase for the night gate?",
    "What is the name of the ferry cat?",
    "What is the name of the Marlowick lifeboat?",
)
NEW_TOKENS = 24


@dataclass(frozen=True)
class DemoResult:
    """The same questions, answered with every pair and within the budget."""

    full: RunResult
    evicted: RunResult

    def as_dict(self) -> dict[str, Any]:
        """Return the row that ``--json`` prints: run's, with the unevicted answers and speed beside it."""
        row = self.evicted.as_dict(MODEL, CHUNK)
        return row | {
            "questions": list(QUESTIONS),
            "full_answers": [answer.text for answer in self.full.answers],
            "full_prefill_s": self.full.prefill_s,
            "full_decode_tokens_per_s": self.full.decode_tokens_per_s,
        }


def demo(*, device: str | None = None, dtype: str | None = None, seed: int = 0) -> DemoResult:
    """Read the shipped document twice, without and with a budget, and ask the same questions."""
    model, tokenizer = load(MODEL, device=device, dtype=dtype)
    with as_file(files("vestige") / "data" / DOCUMENT) as path:
        full = RunConfig(questions=QUESTIONS, context=path, chunk=CHUNK, max_new_tokens=NEW_TOKENS, seed=seed)
        evicted = replace(full, policy=POLICY, share=SHARE, budget=BUDGET)
        return DemoResult(full=run(full, model, tokenizer), evicted=run(evicted, model, tokenizer))


def show(result: DemoResult, console: Console) -> None:
    """Print the answers, the numbers and a picture of what each layer kept."""
    full, evicted = result.full, result.evicted
    for question, whole, kept in zip(QUESTIONS, full.answers, evicted.answers, strict=True):
        lines = Group(
            Text(f"every pair kept:   {whole.text}"),
            Text(f"{evicted.report.kept_fraction:.0%} of pairs kept: {kept.text}", style="bold"),
        )
        console.print(Panel(lines, title=Text(question), title_align="left"))
    console.print(
        shows.report_table(evicted.report, prefill_s=evicted.prefill_s, tokens_per_s=evicted.decode_tokens_per_s)
    )
    console.print(
        f"without eviction: reading {full.prefill_s:.2f} s, decoding {full.decode_tokens_per_s:.1f} tokens/s, "
        f"{shows.megabytes(full.report.kv_bytes)}\n"
    )
    console.print(shows.layers_picture(evicted.report))
