"""The command line: thin, and quick to print its help (heavy imports are inside the commands)."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from vestige.errors import VestigeError

app = typer.Typer(
    help="Keep the KV cache of long-context language models small and truthful.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Measure what eviction costs and saves.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")

out, err = Console(highlight=False, emoji=False), Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Option(help="A named model (see `vestige models`), a folder, or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line, and nothing for people.")]
Seed = Annotated[int, typer.Option(help="For everything that is drawn.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: cuda if there is one, else cpu.")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16, float32, or auto: the checkpoint's.")]
PolicyName = Annotated[str, typer.Option(help="What to keep; see `vestige policies`. Any but full needs --budget.")]
BudgetText = Annotated[
    str | None,
    typer.Option(help="Pairs to keep: 512 is tokens, 0.1 (with a point) a fraction of the length, 64MB bytes."),
]
ShareName = Annotated[
    str | None, typer.Option(help="Who competes for room: head, layer or model; default: the method's own choice.")
]
MemoryName = Annotated[str, typer.Option(help="What remains of the evicted: none.")]
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
    row = result.as_dict(model, chunk, memory)
    if as_json:
        return _print_json(row)
    for asked, reply in zip(config.questions, result.answers, strict=True):
        out.print(f"[dim]{_plain(asked)}[/dim]\n[bold]{_plain(reply.text)}[/bold]\n")
    out.print(
        show.report_table(result.report, prefill_s=result.prefill_s, tokens_per_s=result.decode_tokens_per_s),
        show.layers_picture(result.report),
        sep="\n\n",
    )


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


@bench.command()
def speed(
    model: Model = "smollm2-135m",
    length: Annotated[str, typer.Option(help="Tokens read; several: 2000,8000.")] = "8000",
    budget: Annotated[str, typer.Option(help="Budgets: 512 tokens, 0.05 of the length, 64MB; several: 0.1,0.05.")] = (
        "0.05"
    ),
    policy: Annotated[str, typer.Option(help="Policies; several: snapkv,keydiff.")] = "snapkv",
    batch: Annotated[str, typer.Option(help="Batch sizes; several: 1,4.")] = "1",
    share: ShareName = None,
    chunk: Chunk = 1024,
    blocks: Annotated[int, typer.Option(help="Decode blocks timed per arm.", min=1)] = 5,
    prefills: Annotated[
        int | None, typer.Option(help="Readings per arm, the first a warm-up; default: 3, or 1 beyond 16K.", min=1)
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
    from vestige.download import load

    config = SpeedConfig(
        lengths=_numbers("--length", length), batches=_numbers("--batch", batch), policies=_words(policy),
        budgets=_words(budget), share=share, chunk=chunk, blocks=blocks, prefills=prefills, seed=seed,
    )  # fmt: skip
    network, _ = load(model, device=device, dtype=dtype)
    with show.reading_bar(err, "timing") as advance:
        rows = [{**row, "model": model} for row in timed(config, network, advance)]
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


def _print_json(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def _print_listing(entries: dict[str, str], as_json: bool) -> None:
    if as_json:
        return _print_json(entries)
    width = max(map(len, entries))
    for name, line in entries.items():
        print(f"{name:<{width}}  {line}")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError:
        raise typer.BadParameter(f"{option} takes whole numbers separated by commas, got {text!r}") from None


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
