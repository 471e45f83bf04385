"""Read training documents from files, folders, JSONL and hub data sets; split them by document, cut windows."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from jaxtyping import Int
from torch import Tensor

from vestige.bench import hub
from vestige.bench.config import require_path
from vestige.errors import InputError
from vestige.text import jsonl
from vestige.text.files import read_text
from vestige.text.jsonl import Entry
from vestige.training.data import decontamination

HUB_PREFIX = "hub:"
TEXTS = (".txt", ".md")

Notice = Callable[[str], None]
"""Called with a line about the documents that were left out."""


@dataclass(frozen=True)
class Document:
    """One text and its origin."""

    name: str
    """File, file and line, or data set and row."""
    text: str


def read_documents(
    sources: Sequence[str | Path], *, field: str = "text", notice: Notice | None = None
) -> list[Document]:
    """Return the documents of all sources, without empty ones and without those reserved for benchmarks.

    Args:
        sources: Text files; folders, whose ``*.txt`` and ``*.md`` are read; ``*.jsonl`` files; or hub data sets,
            ``hub:owner/name``, ``hub:owner/name:config`` or ``hub:owner/name:config:split``.
        field: Text field of a JSONL line or a row.
        notice: Called with a line about what was left out; the default prints it to stderr.

    Raises:
        InputError: A source is missing, malformed (the message has file and line), a benchmark, or cannot be fetched;
            or no document is left.
    """
    documents = []
    for source in sources:
        if _is_on_hub(source) or _is_jsonl(Path(source)):
            found = [Document(entry.where, entry.text(field)) for entry in read_entries(source, notice=notice)]
            documents += [document for document in found if document.text.strip()]
        else:
            documents += _read_path(Path(source), notice)
    if not documents:
        named = ", ".join(map(str, sources))
        hint = f"there is nothing to train on in {named}: no text, or only what is for benchmarks"
        raise InputError(hint if named else "name data to train on")
    return documents


def require_sources(sources: Sequence[str | Path]) -> None:
    """Raise an InputError if a file or folder among sources is missing."""
    for source in sources:
        if not _is_on_hub(source):
            require_path(Path(source))


def read_entries(source: str | Path, *, notice: Notice | None = None) -> list[Entry]:
    """Return the lines of a ``*.jsonl`` file or the rows of a hub data set, without those reserved for benchmarks.

    Args:
        source: As :func:`read_documents` takes it.
        notice: As there.

    Raises:
        InputError: As :func:`read_documents`; or the source is of another kind.
    """
    if _is_on_hub(source):
        return _fetch_entries(source, notice)
    path = Path(source)
    require_path(path)
    decontamination.refuse(path)
    if not _is_jsonl(path):
        raise InputError(f"{path} is neither a .jsonl file nor a set on the hub")
    found = jsonl.read(path)
    kept = decontamination.allowed_entries(found, path.stem)
    _report(path, len(found), len(kept), notice)
    return kept


def split_lines(document: Document) -> list[Document]:
    """Return the lines of a text as documents, without empty ones."""
    lines = enumerate(document.text.split("\n"), 1)
    return [Document(f"{document.name}, line {n}", line) for n, line in lines if line.strip()]


def split_documents(documents: Sequence[Document], *, share: float = 0.05) -> tuple[list[Document], list[Document]]:
    """Return the documents for training and those for validation.

    A document's side depends on its text alone, so it is stable under another order or new files. Equal texts count as
    one document. An empty side gets the nearest document; a single document is for training.

    Args:
        documents: In any order, which each side keeps.
        share: Approximate share of the validation documents.

    Raises:
        InputError: The share is not between 0 and 1, or there are no documents.
    """
    if not 0 < share < 1:
        raise InputError(f"the share of documents to validate on must lie between 0 and 1, got {share!r}")
    if not documents:
        raise InputError("there are no documents to split")
    places: dict[float, Document] = {}
    for document in documents:
        places.setdefault(_hash_to_unit(document), document)
    held_out = {place for place in places if place < share} or {min(places)}
    if len(held_out) == len(places):
        held_out.remove(max(held_out))
    sides = [[one for place, one in places.items() if (place in held_out) == side] for side in (False, True)]
    return sides[0], sides[1]


def draw_windows(
    document: Document, tokenizer: Any, *, size: int, count: int = 1, generator: torch.Generator
) -> Int[Tensor, "count size"]:
    """Return token windows at random positions of a document; they may overlap.

    Args:
        document: Tokenized without special tokens.
        tokenizer: A tokenizer of transformers.
        size: Tokens of a window.
        count: Number of windows.
        generator: Draws the positions, as from :func:`~vestige.training.sampler.make_generator`.

    Raises:
        InputError: The document has fewer tokens than a window, or the numbers are not above 0.
    """
    if size < 1 or count < 1:
        raise InputError(f"windows need a size and a count of at least 1, got {size} and {count}")
    ids = torch.tensor(tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < size:
        raise InputError(f"{document.name} has {len(ids)} tokens, fewer than a window of {size}")
    starts = torch.randint(len(ids) - size + 1, (count,), generator=generator)
    return ids[starts[:, None] + torch.arange(size)]  # (count, size)


def _is_on_hub(source: str | Path) -> TypeGuard[str]:
    return isinstance(source, str) and source.startswith(HUB_PREFIX)


def _is_jsonl(path: Path) -> bool:
    return path.suffix == ".jsonl" and not path.is_dir()


def _read_path(path: Path, notice: Notice | None) -> list[Document]:
    require_path(path)
    decontamination.refuse(path)
    files = sorted(p for p in path.iterdir() if p.suffix in TEXTS) if path.is_dir() else [path]
    if any(file.suffix not in TEXTS for file in files):
        raise InputError(f"{path} is not a kind of file to train on: .txt, .md, .jsonl, or a folder of .txt and .md")
    allowed = decontamination.allowed_files(files)
    _report(path, len(files), len(allowed), notice)
    return [Document(str(file), read_text(file)) for file in allowed]


def _fetch_entries(source: str, notice: Notice | None) -> list[Entry]:
    name, _, rest = source.removeprefix(HUB_PREFIX).partition(":")
    config, _, part = rest.partition(":")
    part = part or "train"
    decontamination.allowed_rows((), name, part)  # before a download
    rows = hub.fetch(name, config or None, part, "files or folders of texts")
    allowed = decontamination.allowed_rows(rows, name, part)
    found = [jsonl.entry(dict(row), f"{name}, row {i}") for i, row in enumerate(allowed)]
    kept = decontamination.allowed_entries(found, config or name)
    _report(source, len(rows), len(kept), notice)
    return kept


def _report(source: str | Path, there: int, kept: int, notice: Notice | None) -> None:
    """Report the number of documents of a source that were left out, if any."""
    if kept < there:
        line = f"{source}: {there - kept} of {there} documents are left out, they are for benchmarks only"
        (notice or _print_error)(line)


def _print_error(line: str) -> None:
    print(line, file=sys.stderr)


def _hash_to_unit(document: Document) -> float:
    """Return a number from 0 to 1 that depends on the text alone."""
    digest = hashlib.sha256(document.text.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
