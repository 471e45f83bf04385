"""Common options of the experiments, their folders and summaries, and a resumable run of the benchmark."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from vestige.bench.config import BenchConfig
from vestige.bench.results.aggregate import Record, Row

Out = Annotated[
    Path | None, typer.Option(help="Folder of the results, to go on in; default: see experiments/README.md.")
]
Essays = Annotated[Path | None, typer.Option(help="A folder of text files; default: online.")]
Parts = Annotated[list[str] | None, typer.Option("--part", help="Run only this part; may be repeated.")]
Dev = Annotated[bool, typer.Option("--dev", help="Run on the dev split, to choose by.")]

_T = TypeVar("_T")


def choose_folder(out: Path | None, name: str, *, results: str | None = None, dev: bool = False) -> Path:
    """Return the folder of an experiment's results: ``out``, or ``results/NAME``, or ``out/NAME-dev``.

    Args:
        out: As the user gave it.
        name: Of the experiment.
        results: Folder below ``results/``, if it is not the experiment's name.
        dev: Whether the dev split is run.
    """
    return out or (Path("out", f"{name}-dev") if dev else Path("results", results or name))


def choose_split(dev: bool) -> str:
    """Return the split to run on."""
    return "dev" if dev else "test"


def select_parts(known: Mapping[str, _T], names: Sequence[str] | None) -> dict[str, _T]:
    """Return the parts of these names, or all parts without names.

    Raises:
        typer.BadParameter: There is no such part.
    """
    if wrong := set(names or ()) - known.keys():
        raise typer.BadParameter(f"unknown part {', '.join(sorted(wrong))}; available: {', '.join(known)}")
    return {name: known[name] for name in names or known}


def read_records(folder: Path) -> list[Record]:
    """Return the finished samples of a run; none if it never began."""
    from vestige.bench.results.store import SAMPLES

    file = folder / SAMPLES
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run_bench(
    config: BenchConfig, folder: Path, *, model: str, command: str, label: str, dtype: str | None = None
) -> list[Row]:
    """Start or resume a benchmark, print its table, and return its rows.

    Args:
        config: What to measure.
        folder: For the results.
        model: By name.
        command: The one that remakes the results.
        label: Beside the progress bar.
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


def time_in(folder: Path, command: str, *options: str) -> None:
    """Run ``vestige bench COMMAND`` in a process of its own, its rows in place of those in the folder.

    Raises:
        SystemExit: The command failed.
    """
    from vestige.bench.results.store import SPEED

    (folder / SPEED).unlink(missing_ok=True)
    script = "from vestige.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", script, "bench", command, *options, "--out", str(folder)])
    if done.returncode:
        raise SystemExit(done.returncode)


def write_report(out: Path, *more: Path) -> None:
    """Write ``report.html`` and ``report.md`` of all results in a folder, and in further ones that exist."""
    from vestige.bench.report import report
    from vestige.bench.results.store import ROWS, SPEED

    found = [
        part
        for folder in (out, *more)
        for part in sorted({file.parent for name in (ROWS, SPEED) for file in folder.rglob(name)})
    ]
    report(found, out=out)


def update_rows(file: Path, rows: list[Row]) -> list[Row]:
    """Write rows to a JSON file and return them; without rows, return those of the file.

    Samples are not committed: a fresh clone has only the rows that were made of them.
    """
    from vestige.utils.files import write_atomically

    if not rows:
        return json.loads(file.read_text()) if file.exists() else []
    write_atomically(file, json.dumps(rows, indent=1) + "\n")
    return rows


def write_summary(file: Path, title: str, command: str, *blocks: str, note: str = "") -> None:
    """Write Markdown: a title, the command that remakes it with a note, and blocks."""
    from vestige.utils.files import write_atomically

    write_atomically(file, "\n\n".join([f"# {title}", f"Remade by `{command}`. {note}".rstrip(), *blocks]))


def format_interval(value: float, ends: Sequence[float], spec: str = "+.2f") -> str:
    """Return a number with its interval: ``+0.50 (+0.25 to +0.75)``."""
    return f"{value:{spec}} ({ends[0]:{spec}} to {ends[1]:{spec}})"
