"""Texts to learn from: files, folders, JSONL and sets on the hub as documents; split by document, cut to windows."""

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
from vestige.text.chat_template import read_text
from vestige.training.data import decontamination
from vestige.utils import jsonl
from vestige.utils.jsonl import Entry

HUB_PREFIX = "hub:"
TEXTS = (".txt", ".md")

Notice = Callable[[str], None]
"""Hears a line about what was left out."""


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    """File, file and line, or set and row."""
    text: str


def read_documents(
    sources: Sequence[str | Path], *, field: str = "text", notice: Notice | None = None
) -> list[Document]:
    """Return the documents of all sources, without those that are for benchmarks only.

    Texts of white space alone are passed over.

    Args:
        sources: Text files; folders, of which the ``*.txt`` and ``*.md`` are read; ``*.jsonl`` files; or sets on the
            hub, ``hub:owner/name``, ``hub:owner/name:config`` or ``hub:owner/name:config:split``.
        field: Which field of a line of JSON or of a row is the text.
        notice: Hears what was left out; by default it is said on stderr.

    Raises:
        InputError: A source is missing, malformed (the message has file and line), a benchmark, or cannot be fetched;
            or nothing is left of them.
    """
    documents = []
    for source in sources:
        if _on_hub(source) or _is_jsonl(Path(source)):
            documents += _of_entries(read_entries(source, notice=notice), field)
        else:
            documents += _of_path(Path(source), notice)
    if not documents:
        named = ", ".join(map(str, sources))
        hint = f"there is nothing to train on in {named}: no text, or only what is for benchmarks"
        raise InputError(hint if named else "name data to train on")
    return documents


def require_sources(sources: Sequence[str | Path]) -> None:
    """Raise an InputError if a file or folder among sources is missing."""
    for source in sources:
        if not _on_hub(source):
            require_path(Path(source))


def read_entries(source: str | Path, *, notice: Notice | None = None) -> list[Entry]:
    """Return the lines of a ``*.jsonl`` file or the rows of a set on the hub, without those for benchmarks only.

    Args:
        source: As :func:`read_documents` takes it.
        notice: Hears what was left out; by default it is said on stderr.

    Raises:
        InputError: As :func:`read_documents`; or it is another kind of source.
    """
    if _on_hub(source):
        return _of_hub(source, notice)
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
    """Return the lines of a text that holds one document a line; empty ones are passed over."""
    lines = enumerate(document.text.split("\n"), 1)
    return [Document(f"{document.name}, line {n}", line) for n, line in lines if line.strip()]


def split_documents(documents: Sequence[Document], *, share: float = 0.05) -> tuple[list[Document], list[Document]]:
    """Return the documents to train on and those to validate on.

    A document's side follows from its text alone, so that neither order nor new files move another. Equal texts are
    one document. A side that would be empty gets the document that comes nearest; a single document is trained on.

    Args:
        documents: In any order, which each side keeps.
        share: Of the documents to validate on, about.

    Raises:
        InputError: The share is not between 0 and 1, or there are no documents.
    """
    if not 0 < share < 1:
        raise InputError(f"the share of documents to validate on must lie between 0 and 1, got {share!r}")
    if not documents:
        raise InputError("there are no documents to split")
    places: dict[float, Document] = {}
    for document in documents:
        places.setdefault(_place(document), document)
    held = {place for place in places if place < share} or {min(places)}
    if len(held) == len(places):
        held.remove(max(held))
    sides = [[one for place, one in places.items() if (place in held) == side] for side in (False, True)]
    return sides[0], sides[1]


def draw_windows(
    document: Document, tokenizer: Any, *, size: int, count: int = 1, generator: torch.Generator
) -> Int[Tensor, "count size"]:
    """Return token windows of a document at random places; they may overlap.

    Args:
        document: Tokenised on its own, without special tokens.
        tokenizer: Of transformers.
        size: Tokens of a window.
        count: Windows.
        generator: Says where they begin: :func:`vestige.training.sampler.make_generator`.

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


def _on_hub(source: str | Path) -> TypeGuard[str]:
    return isinstance(source, str) and source.startswith(HUB_PREFIX)


def _is_jsonl(path: Path) -> bool:
    return path.suffix == ".jsonl" and not path.is_dir()


def _of_path(path: Path, notice: Notice | None) -> list[Document]:
    require_path(path)
    decontamination.refuse(path)
    files = sorted(p for p in path.iterdir() if p.suffix in TEXTS) if path.is_dir() else [path]
    if any(file.suffix not in TEXTS for file in files):
        raise InputError(f"{path} is not a kind of file to train on: .txt, .md, .jsonl, or a folder of .txt and .md")
    allowed = decontamination.allowed_files(files)
    _report(path, len(files), len(allowed), notice)
    return [Document(str(file), read_text(file)) for file in allowed]


def _of_hub(source: str, notice: Notice | None) -> list[Entry]:
    name, _, rest = source.removeprefix(HUB_PREFIX).partition(":")
    config, _, part = rest.partition(":")
    part = part or "train"
    decontamination.allowed_rows((), name, part)  # what is refused should not be downloaded
    rows = hub.fetch(name, config or None, part, "files or folders of texts")
    allowed = decontamination.allowed_rows(rows, name, part)
    found = [jsonl.entry(dict(row), f"{name}, row {i}") for i, row in enumerate(allowed)]
    kept = decontamination.allowed_entries(found, config or name)
    _report(source, len(rows), len(kept), notice)
    return kept


def _of_entries(found: Sequence[Entry], field: str) -> list[Document]:
    documents = [Document(entry.where, entry.text(field)) for entry in found]
    return [document for document in documents if document.text.strip()]


def _report(source: str | Path, there: int, kept: int, notice: Notice | None) -> None:
    """Say how many documents of a source were left out, if any."""
    if there == kept:
        return
    line = f"{source}: {there - kept} of {there} documents are left out, they are for benchmarks only"
    (notice or _say)(line)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _place(document: Document) -> float:
    """Return a number from 0 to 1 that follows from the text alone."""
    digest = hashlib.sha256(document.text.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
