"""What the recipes share: their options, a choice among their parts, and a run with a bar that goes on with itself."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from vestige.bench.config import BenchConfig
from vestige.bench.results.aggregate import Record, Row

Out = Annotated[Path, typer.Option(help="Folder of the results; what is there is gone on with.")]
Essays = Annotated[Path | None, typer.Option(help="A folder of text files; default: online.")]
Parts = Annotated[list[str] | None, typer.Option("--part", help="Run only this part; may be repeated.")]
Dev = Annotated[bool, typer.Option("--dev", help="Run on the dev split, to choose by.")]

_T = TypeVar("_T")


def split_of(dev: bool) -> str:
    """Return the split to run on."""
    return "dev" if dev else "test"


def chosen(known: Mapping[str, _T], names: Sequence[str] | None) -> dict[str, _T]:
    """Return the parts that are wanted, all if none are named.

    Raises:
        typer.BadParameter: There is no such part.
    """
    if wrong := set(names or ()) - known.keys():
        raise typer.BadParameter(f"unknown part {', '.join(sorted(wrong))}; available: {', '.join(known)}")
    return {name: known[name] for name in names or known}


def records_of(folder: Path) -> list[Record]:
    """Return what a run has finished, sample by sample; nothing if it never began."""
    from vestige.bench.results.store import SAMPLES

    file = folder / SAMPLES
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def benched(
    config: BenchConfig, folder: Path, *, model: str, command: str, label: str, dtype: str | None = None
) -> list[Row]:
    """Run a benchmark, or go on with it, print its table, and return its rows.

    Args:
        config: What is measured.
        folder: For the results.
        model: By name.
        command: That does it again.
        label: Beside the bar.
        dtype: Of the model; default: the checkpoint's.
    """
    from rich.console import Console

    from vestige.bench.runner import bench
    from vestige.cli import render
    from vestige.models.loading import load

    network, tokenizer = load(model, dtype=dtype)
    with render.reading_bar(Console(stderr=True), label) as advance:
        rows = bench(config, network, tokenizer, name=model, out=folder, resume=True, command=command, progress=advance)
    Console().print(render.bench_table(rows))
    return rows
