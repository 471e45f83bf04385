"""``vestige demo``: the main job on the default model and a shipped document."""

from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from vestige.cli import render
from vestige.models.loading import load
from vestige.pipelines.document_qa import RunConfig, RunResult, run
from vestige.pipelines.erase_passage import EraseConfig, EraseResult, erase_text

MODEL, POLICY, SHARE, BUDGET, CHUNK = "smollm2-135m", "retention", "model", "0.1", 1024
DOCUMENT = "harbour.txt"
QUESTIONS = (
    "What is the pass phrase for the night gate?",
    "What is the name of the ferry cat?",
    "What is the name of the Marlowick lifeboat?",
)
NEW_TOKENS = 24
ERASER = "learned"
STALE = "The ferry to Orm leaves at 7:40 in the morning."
NOTE = (
    "Notes from the harbour office. The ferry to Orm leaves at 9:15 in the morning. Dogs travel free if they behave. "
    "The crane on the east quay is being painted, so please mind the wet paint. The ferry to Tarn leaves at 6:20 in "
    f"the evening. {STALE} Tickets are sold on board."
)
NOTE_QUESTION = "When does the ferry to Orm leave?"


@dataclass(frozen=True)
class DemoResult:
    """Answers to the same questions with all pairs and within a budget, and to a note with and without a stale line."""

    full: RunResult
    evicted: RunResult
    untouched: EraseResult
    erased: EraseResult

    def as_dict(self) -> dict[str, Any]:
        """Return the row that ``--json`` prints: that of ``run``, with full answers, their speed, and the erase."""
        row = self.evicted.as_dict(MODEL, CHUNK)
        return row | {
            "questions": list(QUESTIONS),
            "full_answers": [answer.text for answer in self.full.answers],
            "full_prefill_s": self.full.prefill_s,
            "full_decode_tokens_per_s": self.full.decode_tokens_per_s,
            "untouched_answer": self.untouched.run.answers[0].text,
            "erased_answer": self.erased.run.answers[0].text,
            "edit_s": self.erased.report.edit_s,
        }


def demo(*, device: str | None = None, dtype: str | None = None, seed: int = 0) -> DemoResult:
    """Read the shipped document with and without a budget, answer the same questions, then erase a line of a note."""
    model, tokenizer = load(MODEL, device=device, dtype=dtype)
    with as_file(files("vestige") / "data" / DOCUMENT) as path:
        full = RunConfig(questions=QUESTIONS, context=path, chunk=CHUNK, max_new_tokens=NEW_TOKENS, seed=seed)
        evicted = replace(full, policy=POLICY, share=SHARE, budget=BUDGET)
        whole, kept = (run(config, model, tokenizer) for config in (full, evicted))
    note = RunConfig(questions=(NOTE_QUESTION,), prompt=NOTE, max_new_tokens=NEW_TOKENS, seed=seed)
    untouched, erased = (
        erase_text(EraseConfig(run=note, span_text=STALE, method=method), model, tokenizer)
        for method in ("noop", ERASER)
    )
    return DemoResult(full=whole, evicted=kept, untouched=untouched, erased=erased)


def show(result: DemoResult, console: Console) -> None:
    """Print the answers, the numbers, a picture of the pairs that each layer kept, and the erase of a stale line."""
    full, evicted = result.full, result.evicted
    for question, whole, kept in zip(QUESTIONS, full.answers, evicted.answers, strict=True):
        lines = Group(
            Text(f"every pair kept:   {whole.text}"),
            Text(f"{evicted.report.kept_fraction:.0%} of pairs kept: {kept.text}", style="bold"),
        )
        console.print(Panel(lines, title=Text(question), title_align="left"))
    console.print(
        render.report_table(evicted.report, prefill_s=evicted.prefill_s, tokens_per_s=evicted.decode_tokens_per_s)
    )
    console.print(
        f"without eviction: reading {full.prefill_s:.2f} s, decoding {full.decode_tokens_per_s:.1f} tokens/s, "
        f"{render.megabytes(full.report.kv_bytes)}\n"
    )
    console.print(render.layers_picture(evicted.report))
    before, after = (edit.run.answers[0].text for edit in (result.untouched, result.erased))
    lines = Group(
        Text(f"as it was read:         {before}"),
        Text(f"stale line erased:      {after}", style="bold"),
        Text(f"in {1e3 * result.erased.report.edit_s:.0f} ms, by {ERASER}, without reading the rest again"),
    )
    console.print(Panel(lines, title=Text(NOTE_QUESTION), title_align="left"))
