"""``vestige bench``: the commands that measure."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from vestige.cli.options import (
    BudgetText,
    Chunk,
    Device,
    Dtype,
    Json,
    Model,
    PolicyName,
    Seed,
    ShareName,
    command_line,
    err,
    escape_markup,
    numbers,
    out,
    print_json,
    split_list,
)

LENGTHS = Option(help="Tokens of prompt, question and answer; several: 1024,2048.")
Split = Annotated[str, Option(help="dev (to choose by) or test (to report, once).")]
Essays = Annotated[Path | None, Option(help="A folder of text files for haystacks; default: online.")]
Resume = Annotated[bool, Option("--resume", help="Go on with the results in --out.")]
Results = Annotated[
    Path | None, Option("--out", help="Required: a new folder for the results; with --resume one to go on in.")
]


class TasksOrCommand(TyperGroup):
    """``vestige bench TASK...`` is the command ``tasks``, unless the first word is another command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands:
            args = ["tasks", *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(
    cls=TasksOrCommand,
    help="Measure accuracy, bytes and time (`vestige bench TASK...`, see `vestige bench --help`), speed, or erasers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench.command()
def tasks(
    task: Annotated[
        list[str],
        Argument(
            metavar="TASK...",
            help="ruler, niah, dialogue, longbench, longbench-e, longbench-v2, or: cases FILE.jsonl. A part of a task: "
            "ruler/niah_single_1, longbench/multi_news. Other commands: `vestige bench speed`, `vestige bench erase`, "
            "`vestige bench erase-speed`.",
        ),
    ],
    folder: Results = None,
    model: Model = "smollm2-135m",
    policy: Annotated[str, Option(help="Policies; several: full,snapkv,keydiff. Controls: full, random.")] = "full",
    budget: Annotated[
        str | None, Option(help="Budgets: 512 tokens, 0.05 of the length, 64MB; several: 0.25,0.1.")
    ] = None,
    length: Annotated[str | None, LENGTHS] = None,
    samples: Annotated[int | None, Option(help="Samples of each (task, length); default: the task's own.")] = None,
    split: Split = "dev",
    share: Annotated[str | None, Option(help="Who competes for room: head, layer, model; several: head,model.")] = None,
    memory: Annotated[
        str, Option(help="What remains of the evicted; see `vestige memories`; several: none,moments.")
    ] = "none",
    peer: Annotated[
        str | None,
        Option(help="kvpress:SnapKVPress (any press), transformers:dynamic, transformers:quantized; several."),
    ] = None,
    chunk: Annotated[int | None, Option(help="Tokens per forward while reading; default: one piece.")] = None,
    batch: Annotated[
        int, Option(help="Samples read and answered together, where lengths allow; times are then the batch's.")
    ] = 1,
    question_aware: Annotated[
        bool, Option("--question-aware", help="Read the question before compressing; default: after.")
    ] = False,
    answer_room: Annotated[
        int | None,
        Option(help="End replies so many tokens beyond the longest answer; default: the task's."),
    ] = None,
    essays: Essays = None,
    qa: Annotated[Path | None, Option(help="Questions in SQuAD's or HotpotQA's format; default: online.")] = None,
    longbench: Annotated[Path | None, Option(help="LongBench data: JSONL, or a folder of them.")] = None,
    prompts: Annotated[Path | None, Option(help="A JSON file of prompts in place of LongBench's.")] = None,
    resume: Resume = False,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Put every sample of the tasks through every method and peer: accuracy, bytes and milliseconds side by side."""
    from vestige.bench.config import BenchConfig
    from vestige.bench.methods.method import cross
    from vestige.bench.results.store import check_folder
    from vestige.bench.runner import bench as run_bench
    from vestige.cli import render
    from vestige.models.loading import load

    names, cases = _tasks_and_cases(task)
    methods = cross(
        split_list(policy), split_list(budget or ""), shares=split_list(share or ""), memories=split_list(memory),
        peers=split_list(peer or ""),
    )  # fmt: skip
    config = BenchConfig(
        tasks=names, methods=methods, lengths=numbers("--length", length or ""), samples=samples, split=split,
        chunk=chunk, question_aware=question_aware, batch=batch, answer_room=answer_room, essays=essays, qa=qa,
        cases=cases, longbench=longbench, prompts=prompts, seed=seed,
    )  # fmt: skip
    if folder is None:
        raise typer.BadParameter("name a new folder for the results with --out DIR")
    check_folder(folder, resume=resume)
    network, tokenizer = load(model, device=device, dtype=dtype)
    with render.reading_bar(err, "bench") as advance:
        rows = run_bench(
            config, network, tokenizer, name=model, out=folder, resume=resume, command=command_line(), progress=advance
        )
    if as_json:
        return print_json({"rows": rows})
    out.print(render.bench_table(rows))
    for row in rows:
        if row["score"] is None:
            what = f"failed: {row['task']} {row['policy']}@{row['budget']}: {row['error']}"
            err.print(escape_markup(what), style="red", soft_wrap=True)
    where = escape_markup(str(folder))
    out.print(f"\nresults: {where}; pictures: vestige report {where}", style="dim", soft_wrap=True)


@bench.command()
def speed(
    model: Model = "smollm2-135m",
    length: Annotated[str, Option(help="Tokens read; several: 2000,8000.")] = "8000",
    budget: Annotated[str, Option(help="Budgets: 512 tokens, 0.05 of the length, 64MB; several: 0.1,0.05.")] = "0.05",
    policy: Annotated[str, Option(help="Policies; several: snapkv,keydiff.")] = "snapkv",
    memory: Annotated[str, Option(help="What remains of the evicted; several: none,moments.")] = "none",
    batch: Annotated[str, Option(help="Batch sizes; several: 1,4.")] = "1",
    peer: Annotated[
        str | None, Option(help="Peers beside them: kvpress:SnapKVPress, transformers:quantized; several.")
    ] = None,
    share: ShareName = None,
    chunk: Chunk = 1024,
    blocks: Annotated[int, Option(help="Decode blocks timed per arm.", min=1)] = 5,
    prefills: Annotated[
        int | None, Option(help="Readings per arm, the first a warm-up; default: 3, or 1 beyond 16K.", min=1)
    ] = None,
    folder: Annotated[Path | None, Option("--out", help="Keep the rows in this folder, for `vestige report`.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time prefill and decode against a DynamicCache and an empty cache, all arms alternating in one run."""
    from vestige.bench.results.store import check_folder, write_speed
    from vestige.bench.speed import SpeedConfig
    from vestige.bench.speed import speed as timed
    from vestige.cli import render
    from vestige.models.loading import load

    config = SpeedConfig(
        lengths=numbers("--length", length), batches=numbers("--batch", batch), policies=split_list(policy),
        budgets=split_list(budget), memories=split_list(memory), peers=split_list(peer or ""), share=share, chunk=chunk,
        blocks=blocks, prefills=prefills, seed=seed,
    )  # fmt: skip
    if folder is not None:
        check_folder(folder, resume=False)
    network, _ = load(model, device=device, dtype=dtype)
    with render.reading_bar(err, "timing") as advance:
        rows = timed(config, network, advance, name=model)
    if folder is not None:
        write_speed(folder, rows)
    if any(row["random_weights"] for row in rows):
        err.print("beyond the model's positions: timed its architecture with random weights and stretched positions")
    if as_json:
        return print_json({"rows": rows})
    columns = {
        "length": "d", "batch": "d", "policy": "s", "budget": "s", "memory": "s", "decode_ms": ".1f",
        "decode_over_floor": ".2f", "decode_speedup": ".2f", "prefill_s": ".2f",
        "prefill_overhead": ".2f", "evict_s": ".2f",
    }  # fmt: skip
    out.print(render.rows_table(rows, columns))


@bench.command()
def erase(
    task: Annotated[
        list[str] | None,
        Argument(
            metavar="[TASK...]",
            help="needles_early, needles_late, tool_result, injection, preference, derived_0, derived_250, "
            "derived_1500, several_spans, harmless, repeat, distractor_qa (with --qa); default: all that fit.",
        ),
    ] = None,
    folder: Results = None,
    model: Model = "smollm2-135m",
    length: Annotated[str, LENGTHS] = "2048",
    samples: Annotated[int, Option(help="Samples of each (task, length).", min=1)] = 20,
    method: Annotated[
        str, Option(help="Erasers; several: learned,shift,repair(share=0.3). noop and recompute always run.")
    ] = "learned",
    policy: PolicyName = "full",
    budget: BudgetText = None,
    kept_only: Annotated[
        bool,
        Option("--kept-only", help="Run methods only where the clean reply is right and the untouched wrong."),
    ] = False,
    split: Split = "dev",
    essays: Essays = None,
    qa: Annotated[Path | None, Option(help="Questions in SQuAD's format, for distractor_qa.")] = None,
    resume: Resume = False,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Take passages out of caches by every method and ask: is the answer that of a text which never had them?"""
    from vestige.bench.erasing.config import EraseBenchConfig
    from vestige.bench.erasing.runner import bench_erase as run_bench
    from vestige.bench.results.store import check_folder
    from vestige.cli import render
    from vestige.models.loading import load

    config = EraseBenchConfig(
        tasks=tuple(task or ()), lengths=numbers("--length", length), samples=samples, methods=split_list(method),
        policy=policy, budget=budget, kept_only=kept_only, split=split, essays=essays, qa=qa, seed=seed,
    )  # fmt: skip
    if folder is None:
        raise typer.BadParameter("name a new folder for the results with --out DIR")
    check_folder(folder, resume=resume)
    network, tokenizer = load(model, device=device, dtype=dtype)
    with render.reading_bar(err, "bench erase") as advance:
        rows = run_bench(
            config, network, tokenizer, name=model, out=folder, resume=resume, command=command_line(), progress=advance
        )
    if as_json:
        return print_json({"rows": rows})
    out.print(render.erase_bench_table(rows))
    for row in rows:
        if row["error"] is not None:
            err.print(
                escape_markup(f"failed: {row['task']} {row['method']}: {row['error']}"), style="red", soft_wrap=True
            )
    out.print(f"\nresults: {escape_markup(str(folder))}", style="dim", soft_wrap=True)


@bench.command()
def erase_speed(
    model: Model = "smollm2-135m",
    length: Annotated[str, Option(help="Tokens read before; several: 1000,8000.")] = "1000,2000,4000,8000",
    method: Annotated[
        str, Option(help="Erasers; several: learned,shift. noop and recompute are always timed.")
    ] = "learned",
    before: Annotated[int, Option(help="Tokens before the span.")] = 100,
    span: Annotated[int, Option(help="Tokens erased.")] = 100,
    rounds: Annotated[int, Option(help="How often each is timed, after a warm-up.")] = 5,
    folder: Annotated[Path | None, Option("--out", help="Keep the rows in this folder.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time edits by length, all methods alternating: the edit, the first token behind it and decoding, apart."""
    from vestige.bench.erasing.latency import LatencyConfig, latency
    from vestige.bench.results.store import check_speed_folder, write_speed
    from vestige.cli import render
    from vestige.models.loading import load

    config = LatencyConfig(
        lengths=numbers("--length", length), methods=split_list(method), before=before, span=span, rounds=rounds,
        seed=seed,
    )  # fmt: skip
    if folder is not None:
        check_speed_folder(folder)
    network, _ = load(model, device=device, dtype=dtype)
    with render.reading_bar(err, "timing") as advance:
        rows = latency(config, network, name=model, progress=advance)
    if folder is not None:
        write_speed(folder, rows)
    if as_json:
        return print_json({"rows": rows})
    columns = {"length": "d", "method": "s", "edit_s": ".3f", "first_token_s": ".3f", "decode_ms": ".1f"}
    out.print(render.rows_table(rows, columns))


def _tasks_and_cases(words: list[str]) -> tuple[tuple[str, ...], Path | None]:
    """Return the names of the tasks, and the file that follows the word ``cases``."""
    at = next((i for i, word in enumerate(words) if word.partition("/")[0] == "cases"), None)
    if at is None:
        return tuple(words), None
    if at + 1 == len(words):
        raise typer.BadParameter("cases needs a file: vestige bench cases FILE.jsonl")
    return (*words[: at + 1], *words[at + 2 :]), Path(words[at + 1])
