"""The command line: thin, and quick to print its help (heavy imports are inside the commands)."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from vestige.errors import VestigeError

if TYPE_CHECKING:
    from vestige.run import RunResult

app = typer.Typer(
    help="Keep the KV cache of long-context language models small and truthful.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


class TasksOrCommand(TyperGroup):
    """``vestige bench TASK...`` is the command ``tasks``, unless the first word is another command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands:
            args = ["tasks", *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(
    cls=TasksOrCommand,
    help="Measure accuracy, bytes and time (`vestige bench TASK...`, see `vestige bench --help`), or speed alone.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")

out, err = Console(highlight=False, emoji=False), Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Option(help="A named model (see `vestige models`), a folder, or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line, and nothing for people.")]
Seed = Annotated[int, typer.Option(help="For everything that is drawn.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: cuda if there is one, else cpu.")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16, float32, or auto: the checkpoint's.")]
PolicyName = Annotated[str, typer.Option(help="What to keep: snapkv, or snapkv(kernel=7); see `vestige policies`.")]
BudgetText = Annotated[
    str | None,
    typer.Option(help="Pairs to keep: 512 is tokens, 0.1 (with a point) a fraction of the length, 64MB bytes."),
]
ShareName = Annotated[
    str | None, typer.Option(help="Who competes for room: head, layer or model; default: the method's own choice.")
]
MemoryName = Annotated[str, typer.Option(help="What remains of the evicted: moments(mass=1); see `vestige memories`.")]
Chunk = Annotated[int, typer.Option(help="Tokens per forward while reading.", min=1)]
NewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from vestige import __version__

        out.print(f"vestige {__version__}")


@app.command()
def run(
    model: Model = "smollm2-135m",
    context: Annotated[Path | None, typer.Option(help="A text file to read.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A text to read, in place of a file.")] = None,
    cache: Annotated[Path | None, typer.Option(help="A reading kept by --save, in place of a text.")] = None,
    question: Annotated[list[str] | None, typer.Option(help="Asked about the text; may be given many times.")] = None,
    policy: PolicyName = "full",
    budget: BudgetText = None,
    share: ShareName = None,
    memory: MemoryName = "none",
    chunk: Chunk = 1024,
    max_new_tokens: NewTokens = 64,
    save: Annotated[Path | None, typer.Option(help="Keep the compressed reading in this new folder.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Read a long text within a budget and answer questions about it."""
    from vestige import show
    from vestige.download import load
    from vestige.run import RunConfig
    from vestige.run import run as job

    config = RunConfig(
        questions=tuple(question or ()), context=context, prompt=prompt, cache=cache, policy=policy, budget=budget,
        share=share, memory=memory, chunk=chunk, max_new_tokens=max_new_tokens, save=save, seed=seed,
    )  # fmt: skip
    config.text()  # a missing file should not cost a download
    network, tokenizer = load(model, device=device, dtype=dtype)
    with show.reading_bar(err) as advance:
        result = job(config, network, tokenizer, advance)
    row = result.as_dict(model, chunk)
    if as_json:
        return _print_json(row)
    _print_answers(config.questions, result)
    out.print(
        show.report_table(result.report, prefill_s=result.prefill_s, tokens_per_s=result.decode_tokens_per_s),
        show.layers_picture(result.report),
        sep="\n\n",
    )


@app.command()
def erase(
    model: Model = "smollm2-135m",
    context: Annotated[Path | None, typer.Option(help="A text file to read.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A text to read, in place of a file.")] = None,
    span_text: Annotated[str | None, typer.Option(help="The passage to erase; it must occur once.")] = None,
    span: Annotated[str | None, typer.Option(help="A:B in place of the passage: tokens of the text.")] = None,
    question: Annotated[list[str] | None, typer.Option(help="Asked afterwards; may be given many times.")] = None,
    method: Annotated[
        str, typer.Option(help="learned, recompute, repair(share=0.3), ...; see `vestige erasers`.")
    ] = "learned",
    policy: PolicyName = "full",
    budget: BudgetText = None,
    share: ShareName = None,
    memory: MemoryName = "none",
    chunk: Chunk = 1024,
    max_new_tokens: NewTokens = 64,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Read a text, take a passage out of what was read, and ask about what is left."""
    from vestige import show
    from vestige.download import load
    from vestige.erase_text import EraseConfig, erase_text
    from vestige.run import RunConfig

    reading = RunConfig(
        questions=tuple(question or ()), context=context, prompt=prompt, policy=policy, budget=budget, share=share,
        memory=memory, chunk=chunk, max_new_tokens=max_new_tokens, seed=seed,
    )  # fmt: skip
    config = EraseConfig(run=reading, span_text=span_text, span=span, method=method)
    reading.text()  # a missing file should not cost a download
    network, tokenizer = load(model, device=device, dtype=dtype)
    with show.reading_bar(err) as advance:
        result = erase_text(config, network, tokenizer, advance)
    row = result.as_dict(model, chunk)
    if as_json:
        return _print_json(row)
    out.print(f"[dim]erased:[/dim] {_plain(result.passage.strip())}\n")
    _print_answers(reading.questions, result.run)
    out.print(show.erase_table(result.report))


@app.command()
def chat(
    model: Model = "smollm2-135m",
    policy: PolicyName = "full",
    budget: BudgetText = None,
    share: ShareName = None,
    memory: MemoryName = "none",
    method: Annotated[str, typer.Option(help="What /erase does; see `vestige erasers`.")] = "recompute",
    system: Annotated[str | None, typer.Option(help="The system message; default: the chat template's.")] = None,
    load_from: Annotated[Path | None, typer.Option("--load", help="Go on with a conversation kept by /save.")] = None,
    chunk: Chunk = 1024,
    max_new_tokens: NewTokens = 256,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
) -> None:
    """Talk in the terminal; /erase takes a message or a passage out, /help lists the commands."""
    from vestige import erasers, policies
    from vestige import memory as memories
    from vestige.budget import Budget
    from vestige.chat import chat as talk
    from vestige.download import load
    from vestige.session import Session

    eraser, kept = erasers.make(method), memories.make(memory)
    chosen = policies.make(policy, None if budget is None else Budget.parse(budget), share=share, seed=seed)
    network, tokenizer = load(model, device=device, dtype=dtype)
    if load_from is not None:
        session = Session.load(load_from, network, tokenizer, eraser)
    else:
        session = Session(network, tokenizer, chosen, kept, eraser, system=system, chunk=chunk)
    asking = sys.stdin.isatty()
    talk(
        session, sys.stdin, out, max_new_tokens=max_new_tokens,
        prompt=lambda: out.print("[bold]>[/bold] ", end="") if asking else None,
    )  # fmt: skip


@app.command()
def demo(device: Device = None, dtype: Dtype = None, seed: Seed = 0, as_json: Json = False) -> None:
    """Show the main job on the default model and a shipped document, in about a minute."""
    from vestige import demo as shown

    with err.status("getting the model and reading ..."):
        result = shown.demo(device=device, dtype=dtype, seed=seed)
    if as_json:
        return _print_json(result.as_dict())
    shown.show(result, out)


@app.command()
def models(seed: Seed = 0, as_json: Json = False) -> None:
    """List the models that can be named; a folder or a hub id works too."""
    from vestige.named import NAMED

    _print_listing({name: model.description for name, model in NAMED.items()}, as_json)


@app.command()
def policies(seed: Seed = 0, as_json: Json = False) -> None:
    """List the eviction policies."""
    from vestige.policies import POLICIES, resolve

    _print_listing({name: (resolve(name).__doc__ or "").strip().splitlines()[0] for name in POLICIES}, as_json)


@app.command()
def erasers(seed: Seed = 0, as_json: Json = False) -> None:
    """List the ways to take a span out of a cache."""
    from vestige.erasers import ERASERS, resolve

    _print_listing({name: (resolve(name).__doc__ or "").strip().splitlines()[0] for name in ERASERS}, as_json)


@app.command()
def memories(seed: Seed = 0, as_json: Json = False) -> None:
    """List what can remain of evicted pairs."""
    from vestige.memory import MEMORIES, resolve

    lines = {name: ((cls := resolve(name)) and cls.__doc__) or "Evicted pairs leave nothing." for name in MEMORIES}
    _print_listing({name: line.strip().splitlines()[0] for name, line in lines.items()}, as_json)


@bench.command()
def tasks(
    task: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK...",
            help="ruler, niah, dialogue, longbench, longbench-e, longbench-v2, or: cases FILE.jsonl. A part of a task: "
            "ruler/niah_single_1, longbench/multi_news. `vestige bench speed` times alone.",
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Required: a new folder for the results; with --resume one to go on in."),
    ] = None,
    model: Model = "smollm2-135m",
    policy: Annotated[
        str, typer.Option(help="Policies; several: full,snapkv,keydiff. Controls: full, random.")
    ] = "full",
    budget: Annotated[
        str | None, typer.Option(help="Budgets: 512 tokens, 0.05 of the length, 64MB; several: 0.25,0.1.")
    ] = None,
    length: Annotated[
        str | None, typer.Option(help="Tokens of prompt, question and answer; several: 1024,2048.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples of each (task, length); default: the task's own.")
    ] = None,
    split: Annotated[str, typer.Option(help="dev (to choose by) or test (to report, once).")] = "dev",
    share: Annotated[
        str | None, typer.Option(help="Who competes for room: head, layer, model; several: head,model.")
    ] = None,
    memory: Annotated[
        str, typer.Option(help="What remains of the evicted; see `vestige memories`; several: none,moments.")
    ] = "none",
    peer: Annotated[
        str | None,
        typer.Option(help="kvpress:SnapKVPress (any press), transformers:dynamic, transformers:quantized; several."),
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens per forward while reading; default: one piece.")] = None,
    batch: Annotated[
        int, typer.Option(help="Samples read and answered together, where lengths allow; times are then the batch's.")
    ] = 1,
    question_aware: Annotated[
        bool, typer.Option("--question-aware", help="Read the question before compressing; default: after.")
    ] = False,
    answer_room: Annotated[
        int | None,
        typer.Option(help="End replies so many tokens beyond the longest answer; default: the task's."),
    ] = None,
    essays: Annotated[Path | None, typer.Option(help="A folder of text files for haystacks; default: online.")] = None,
    qa: Annotated[Path | None, typer.Option(help="Questions in SQuAD's or HotpotQA's format; default: online.")] = None,
    longbench: Annotated[Path | None, typer.Option(help="LongBench data: JSONL, or a folder of them.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A JSON file of prompts in place of LongBench's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the results in --out.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Put every sample of the tasks through every method and peer: accuracy, bytes and milliseconds side by side."""
    from vestige import show
    from vestige.bench.arms import cross
    from vestige.bench.config import BenchConfig
    from vestige.bench.run import bench as job
    from vestige.bench.store import check_folder
    from vestige.download import load

    names, cases = _tasks_and_cases(task)
    arms = cross(
        _words(policy), _words(budget or ""), shares=_words(share or ""), memories=_words(memory),
        peers=_words(peer or ""),
    )  # fmt: skip
    config = BenchConfig(
        tasks=names, arms=arms, lengths=_numbers("--length", length or ""), samples=samples, split=split, chunk=chunk,
        question_aware=question_aware, batch=batch, answer_room=answer_room, essays=essays, qa=qa, cases=cases,
        longbench=longbench, prompts=prompts, seed=seed,
    )  # fmt: skip
    if folder is None:
        raise typer.BadParameter("name a new folder for the results with --out DIR")
    check_folder(folder, resume=resume)
    network, tokenizer = load(model, device=device, dtype=dtype)
    with show.reading_bar(err, "bench") as advance:
        rows = job(
            config, network, tokenizer, name=model, out=folder, resume=resume, command=_typed(), progress=advance
        )
    if as_json:
        return _print_json({"rows": rows})
    out.print(show.bench_table(rows))
    for row in rows:
        if row["score"] is None:
            what = f"failed: {row['task']} {row['policy']}@{row['budget']}: {row['error']}"
            err.print(_plain(what), style="red", soft_wrap=True)
    where = _plain(str(folder))
    out.print(f"\nresults: {where}; pictures: vestige report {where}", style="dim", soft_wrap=True)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Result folders, or folders of them.")],
    output: Annotated[
        Path | None, typer.Option("--out", help="Where report.html and report.md go; default: the first DIR.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Stands above the report.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make tables and plots of result folders: one HTML with the pictures inside, one Markdown."""
    from vestige.bench.report import TITLE
    from vestige.bench.report import report as made

    with err.status("drawing ..."):
        written = made(folders, out=output, title=title or TITLE)
    if as_json:
        return _print_json({"html": str(written.html), "markdown": str(written.markdown), "rows": written.rows})
    out.print(f"{written.rows} rows: {_plain(str(written.html))} and {_plain(str(written.markdown))}", soft_wrap=True)


@bench.command()
def speed(
    model: Model = "smollm2-135m",
    length: Annotated[str, typer.Option(help="Tokens read; several: 2000,8000.")] = "8000",
    budget: Annotated[str, typer.Option(help="Budgets: 512 tokens, 0.05 of the length, 64MB; several: 0.1,0.05.")] = (
        "0.05"
    ),
    policy: Annotated[str, typer.Option(help="Policies; several: snapkv,keydiff.")] = "snapkv",
    batch: Annotated[str, typer.Option(help="Batch sizes; several: 1,4.")] = "1",
    peer: Annotated[
        str | None, typer.Option(help="Peers beside them: kvpress:SnapKVPress, transformers:quantized; several.")
    ] = None,
    share: ShareName = None,
    chunk: Chunk = 1024,
    blocks: Annotated[int, typer.Option(help="Decode blocks timed per arm.", min=1)] = 5,
    prefills: Annotated[
        int | None, typer.Option(help="Readings per arm, the first a warm-up; default: 3, or 1 beyond 16K.", min=1)
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Keep the rows in this folder, for `vestige report`.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time prefill and decode against a DynamicCache and an empty cache, all arms alternating in one run."""
    from vestige import show
    from vestige.bench.speed import SpeedConfig
    from vestige.bench.speed import speed as timed
    from vestige.bench.store import check_folder, keep_speed
    from vestige.download import load

    config = SpeedConfig(
        lengths=_numbers("--length", length), batches=_numbers("--batch", batch), policies=_words(policy),
        budgets=_words(budget), peers=_words(peer or ""), share=share, chunk=chunk, blocks=blocks,
        prefills=prefills, seed=seed,
    )  # fmt: skip
    if folder is not None:
        check_folder(folder, resume=False)
    network, _ = load(model, device=device, dtype=dtype)
    with show.reading_bar(err, "timing") as advance:
        rows = timed(config, network, advance, name=model)
    if folder is not None:
        keep_speed(folder, rows)
    if any(row["random_weights"] for row in rows):
        err.print("beyond the model's positions: timed its architecture with random weights and stretched positions")
    if as_json:
        return _print_json({"rows": rows})
    columns = {
        "length": "d", "batch": "d", "policy": "s", "budget": "s", "decode_ms": ".1f",
        "decode_over_floor": ".2f", "decode_speedup": ".2f", "prefill_s": ".2f",
        "prefill_overhead": ".2f", "evict_s": ".2f",
    }  # fmt: skip
    out.print(show.rows_table(rows, columns))


def main() -> NoReturn:
    """Run the command line; bad input is one line on stderr and exit status 2."""
    try:
        status = app(standalone_mode=False)
        if status == 130:
            _complain("interrupted", 130)
    except VestigeError as error:
        status = _complain(str(error))
    except KeyboardInterrupt:
        status = _complain("interrupted", 130)
    except Exception as error:  # typer brings its own click, so its errors are known by their shape
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)  # the help, as it is
            sys.exit(2)
        status = _complain(error.format_message())
    sys.exit(status if isinstance(status, int) else 0)


def _complain(message: str, status: int = 2) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _print_answers(questions: tuple[str, ...], result: "RunResult") -> None:
    for asked, reply in zip(questions, result.answers, strict=True):
        out.print(f"[dim]{_plain(asked)}[/dim]\n[bold]{_plain(reply.text)}[/bold]\n")


def _print_json(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def _print_listing(entries: dict[str, str], as_json: bool) -> None:
    if as_json:
        return _print_json(entries)
    width = max(map(len, entries))
    for name, line in entries.items():
        print(f"{name:<{width}}  {line}")


def _words(text: str) -> tuple[str, ...]:
    from vestige.called import split

    return tuple(split(text))


def _typed() -> str:
    """Return this command as it was typed."""
    return shlex.join(["vestige", *sys.argv[1:]])


def _tasks_and_cases(words: list[str]) -> tuple[tuple[str, ...], Path | None]:
    """Return the names of the tasks, and the file that follows the word ``cases``."""
    at = next((i for i, word in enumerate(words) if word.partition("/")[0] == "cases"), None)
    if at is None:
        return tuple(words), None
    if at + 1 == len(words):
        raise typer.BadParameter("cases needs a file: vestige bench cases FILE.jsonl")
    return (*words[: at + 1], *words[at + 2 :]), Path(words[at + 1])


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError:
        raise typer.BadParameter(f"{option} takes whole numbers separated by commas, got {text!r}") from None


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
