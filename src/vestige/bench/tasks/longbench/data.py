"""LongBench's samples, from the user's JSONL files or the hub."""

from collections.abc import Collection
from pathlib import Path

from vestige.bench import hub
from vestige.errors import InputError, unknown_name_message
from vestige.text import jsonl
from vestige.text.jsonl import Entry

HUB, HUB_V2 = "Xnhyacinth/LongBench", "zai-org/LongBench-v2"
"""The first is a copy in parquet files with prompt columns (the one that kvpress evaluates on): the original,
THUDM/LongBench, is a script, and ``datasets`` runs none since version 4."""


def load_from_hub(repo: str, config: str | None, split: str) -> list[Entry]:
    """Return the samples of a data set on the hub; arguments and errors as for :func:`vestige.bench.hub.fetch`."""
    name = f"{repo} {config}" if config else repo
    samples = [dict(sample) for sample in hub.fetch(repo, config, split, "--longbench PATH")]
    return [Entry(where=f"{name}, sample {i}", columns=sample) for i, sample in enumerate(samples)]


def load_from_path(path: Path, suffix: str, known: Collection[str], part: str | None) -> dict[str, list[Entry]]:
    """Return the samples of a file, or of a folder with ``<data set><suffix>.jsonl``, by data set.

    In a file each line names its data set (``dataset``, or ``task`` in kvpress's data); a line that does not is of the
    data set that the file is named after.

    Args:
        path: A JSONL file, or a folder of them.
        suffix: ``_e`` for LongBench-E.
        known: Valid names of data sets.
        part: The data set wanted; None is all that are there.

    Raises:
        InputError: A file is missing or malformed, or the data set wanted is not there.
    """
    if not path.is_dir():
        return _load_file(path, known, part)
    names = [part] if part else [name for name in known if (path / f"{name}{suffix}.jsonl").exists()]
    if not names:
        raise InputError(f"{path} has none of LongBench's files, such as {next(iter(known))}{suffix}.jsonl")
    return {name: jsonl.read(path / f"{name}{suffix}.jsonl") for name in names}


def _load_file(path: Path, known: Collection[str], part: str | None) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for sample in jsonl.read(path):
        named = [column for column in ("dataset", "task") if sample.has(column)]
        name = sample.text(named[0]) if named else path.stem
        name = name.removesuffix("_e").removesuffix("-e")
        if name not in known:
            raise sample.error(unknown_name_message("data set", name, known))
        groups.setdefault(name, []).append(sample)
    if part is None:
        return groups
    if part not in groups:
        raise InputError(f"{path} has no sample of {part}; it has {', '.join(groups)}")
    return {part: groups[part]}


def load_v2_from_path(path: Path) -> list[Entry]:
    """Return the samples of LongBench v2, from a JSONL file or from a JSON list like the original data.json.

    In a folder the file is ``data.json``, or else ``longbench-v2.jsonl``.

    Raises:
        InputError: The file is missing or malformed.
    """
    if path.is_dir():
        original = path / "data.json"
        path = original if original.exists() else path / "longbench-v2.jsonl"
    if path.suffix != ".json":
        return jsonl.read(path)
    samples = jsonl.read_whole(path)
    if not isinstance(samples, list):
        raise InputError(f"{path}: not a JSON list of samples; one sample a line is a .jsonl file")
    return [jsonl.entry(sample, f"{path}, sample {i}") for i, sample in enumerate(samples)]
