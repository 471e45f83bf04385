"""The command line. Heavy imports are inside the commands, so that help is quick."""

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer import Argument, Option

from vestige.cli.bench import bench
from vestige.cli.options import (
    BudgetText,
    Chunk,
    Device,
    Dtype,
    Json,
    MemoryName,
    Model,
    NewTokens,
    PolicyName,
    Seed,
    ShareName,
    err,
    escape_markup,
    out,
    print_json,
)
from vestige.cli.train import train
from vestige.errors import InputError, VestigeError

app = typer.Typer(
    help="Keep the KV cache of long-context language models small and truthful.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


app.add_typer(bench, name="bench")
app.add_typer(train, name="train")


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from vestige.utils.version import __version__

        out.print(f"vestige {__version__}")


@app.command()
def run(
    model: Model = "smollm2-135m",
    context: Annotated[Path | None, Option(help="A text file to read.")] = None,
    prompt: Annotated[str | None, Option(help="A text to read, in place of a file.")] = None,
    cache: Annotated[Path | None, Option(help="A reading kept by --save, in place of a text.")] = None,
    question: Annotated[list[str] | None, Option(help="Asked about the text; may be given many times.")] = None,
    policy: PolicyName = "full",
    budget: BudgetText = None,
    share: ShareName = None,
    memory: MemoryName = "none",
    chunk: Chunk = 1024,
    max_new_tokens: NewTokens = 64,
    save: Annotated[Path | None, Option(help="Keep the compressed reading in this new folder.")] = None,
    explain: Annotated[
        list[str] | None,
        Option(help="A passage that the answer rests on: what attention it gets before and after eviction."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Read a long text within a budget and answer questions about it."""
    from vestige.cli import render
    from vestige.models.loading import load
    from vestige.pipelines.document_qa import RunConfig
    from vestige.pipelines.document_qa import run as job

    config = RunConfig(
        questions=tuple(question or ()), context=context, prompt=prompt, cache=cache, policy=policy, budget=budget,
        share=share, memory=memory, chunk=chunk, max_new_tokens=max_new_tokens, save=save,
        explain=tuple(explain or ()), seed=seed,
    )  # fmt: skip
    config.text()  # a missing file is found before a download
    network, tokenizer = load(model, device=device, dtype=dtype)
    with render.reading_bar(err) as advance:
        result = job(config, network, tokenizer, advance)
    row = result.as_dict(model, chunk)
    if as_json:
        return print_json(row)
    _print_answers(config.questions, result.answers)
    out.print(
        render.report_table(result.report, prefill_s=result.prefill_s, tokens_per_s=result.decode_tokens_per_s),
        render.layers_picture(result.report),
        *(render.explained_table(explained) for explained in result.explained),
        sep="\n\n",
    )


@app.command()
def erase(
    model: Model = "smollm2-135m",
    context: Annotated[Path | None, Option(help="A text file to read.")] = None,
    prompt: Annotated[str | None, Option(help="A text to read, in place of a file.")] = None,
    span_text: Annotated[str | None, Option(help="The passage to erase; it must occur once.")] = None,
    span: Annotated[str | None, Option(help="A:B in place of the passage: tokens of the text.")] = None,
    question: Annotated[list[str] | None, Option(help="Asked afterwards; may be given many times.")] = None,
    method: Annotated[
        str, Option(help="learned, recompute, repair(share=0.3), ...; see `vestige erasers`.")
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
    from vestige.cli import render
    from vestige.models.loading import load
    from vestige.pipelines.document_qa import RunConfig
    from vestige.pipelines.erase_passage import EraseConfig, erase_text

    reading = RunConfig(
        questions=tuple(question or ()), context=context, prompt=prompt, policy=policy, budget=budget, share=share,
        memory=memory, chunk=chunk, max_new_tokens=max_new_tokens, seed=seed,
    )  # fmt: skip
    config = EraseConfig(run=reading, span_text=span_text, span=span, method=method)
    reading.text()  # a missing file is found before a download
    network, tokenizer = load(model, device=device, dtype=dtype)
    with render.reading_bar(err) as advance:
        result = erase_text(config, network, tokenizer, advance)
    row = result.as_dict(model, chunk)
    if as_json:
        return print_json(row)
    out.print(f"[dim]erased:[/dim] {escape_markup(result.passage.strip())}\n")
    _print_answers(reading.questions, result.run.answers)
    out.print(render.erase_table(result.report))


@app.command()
def chat(
    model: Model = "smollm2-135m",
    policy: PolicyName = "full",
    budget: BudgetText = None,
    share: ShareName = None,
    memory: MemoryName = "none",
    method: Annotated[str, Option(help="What /erase does; see `vestige erasers`.")] = "recompute",
    system: Annotated[str | None, Option(help="The system message; default: the chat template's.")] = None,
    load_from: Annotated[Path | None, Option("--load", help="Go on with a conversation kept by /save.")] = None,
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
    from vestige.cli.chat import chat as talk
    from vestige.models.loading import load
    from vestige.pipelines.session import Session

    if load_from is not None and (budget or share or system or policy != "full" or memory != "none"):
        raise InputError(
            "a conversation that was kept brings its policy, budget, memory and system message along; leave --policy, "
            "--budget, --share, --memory and --system out"
        )
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
    from vestige.cli import demo as shown

    with err.status("getting the model and reading ..."):
        result = shown.demo(device=device, dtype=dtype, seed=seed)
    if as_json:
        return print_json(result.as_dict())
    shown.show(result, out)


@app.command()
def models(seed: Seed = 0, as_json: Json = False) -> None:
    """List the models that can be named; a folder or a hub id works too."""
    from vestige.models.catalog import NAMED

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


@app.command()
def report(
    folders: Annotated[list[Path], Argument(metavar="DIR...", help="Result folders, or folders of them.")],
    output: Annotated[
        Path | None, Option("--out", help="Where report.html and report.md go; default: the first DIR.")
    ] = None,
    title: Annotated[str | None, Option(help="Stands above the report.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make tables and plots of result folders: one HTML with the pictures inside, one Markdown."""
    from vestige.bench.report import TITLE
    from vestige.bench.report import report as made

    with err.status("drawing ..."):
        written = made(folders, out=output, title=title or TITLE)
    if as_json:
        return print_json({"html": str(written.html), "markdown": str(written.markdown), "rows": written.rows})
    out.print(
        f"{written.rows} rows: {escape_markup(str(written.html))} and {escape_markup(str(written.markdown))}",
        soft_wrap=True,
    )


def main() -> NoReturn:
    """Run the command line; bad input is one line on stderr and exit status 2."""
    try:
        status = app(standalone_mode=False)
        if status == 130:
            _print_error("interrupted", 130)
    except VestigeError as error:
        status = _print_error(str(error))
    except KeyboardInterrupt:
        status = _print_error("interrupted", 130)
    except OSError as error:
        if error.filename is None:
            raise
        status = _print_error(f"cannot use {error.filename}: {error.strerror}")
    except Exception as error:  # typer brings its own click, so its errors are recognised by their methods
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)  # the help text
            sys.exit(2)
        status = _print_error(error.format_message())
    sys.exit(status if isinstance(status, int) else 0)


def _print_error(message: str, status: int = 2) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _print_answers(questions: tuple[str, ...], answers: tuple[Any, ...]) -> None:
    for question, reply in zip(questions, answers, strict=True):
        out.print(f"[dim]{escape_markup(question)}[/dim]\n[bold]{escape_markup(reply.text)}[/bold]\n")


def _print_listing(entries: dict[str, str], as_json: bool) -> None:
    if as_json:
        return print_json(entries)
    width = max(map(len, entries))
    for name, line in entries.items():
        print(f"{name:<{width}}  {line}")
