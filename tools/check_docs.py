"""Check the documents: generated parts are fresh, lines are wrapped, links resolve, README.md stays short.

Prints a line for each fault and exits with 1 if there is any.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from build_docs import PARTS, ROOT, build

WIDTH = 100
README_LINES, README_BYTES = 150, 9_000
LINK = re.compile(r"(?<!`)!?\[[^\]\[]*\]\(([^)\s]+)\)")


def find_documents() -> list[Path]:
    """Return the documents that are checked."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*top, *sorted((ROOT / "docs").rglob("*.md"))]


def find_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a document that lie outside code fences."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def is_wrapped(line: str) -> bool:
    """Tell whether a line of prose is short enough; tables and links alone on a line may be longer."""
    bare = line.strip().removeprefix("* ").removeprefix("- ").rstrip(".")
    return len(line) <= WIDTH or line.lstrip().startswith(("|", "<!--")) or LINK.fullmatch(bare) is not None


def find_anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as forges make them."""
    headings = [line.lstrip("#").strip() for _, line in find_prose(text) if re.match(r"#{1,6} ", line)]
    anchors: set[str] = set()
    for heading in headings:
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        anchors.add(f"{anchor}-{sum(known.startswith(anchor) for known in anchors)}" if anchor in anchors else anchor)
    return anchors


def find_faults(path: Path, text: str) -> Iterator[str]:
    """Yield the faults of one document: lines that are too long, relative links that lead nowhere."""
    for number, line in find_prose(text):
        if not is_wrapped(line):
            yield f"{number}: {len(line)} characters, more than {WIDTH}"
        for target in LINK.findall(line):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            linked = (path.parent / name).resolve() if name else path
            if not linked.exists():
                yield f"{number}: no such file: {target}"
            elif anchor and linked.suffix == ".md" and anchor not in find_anchors(linked.read_text()):
                yield f"{number}: no such heading: {target}"


def find_stale() -> Iterator[str]:
    """Yield the documents whose generated parts are stale."""
    for document in PARTS:
        if build(document) != (ROOT / document).read_text():
            yield f"{document}: stale; run python tools/build_docs.py"


def find_excess(text: str) -> Iterator[str]:
    """Yield the limits of README.md that its text exceeds."""
    lines, size = text.count("\n"), len(text.encode())
    if lines > README_LINES or size > README_BYTES:
        yield f"README.md: {lines} lines and {size} bytes; at most {README_LINES} and {README_BYTES}"


def main() -> int:
    """Print every fault; return 1 if there is any."""
    faults = [*find_stale(), *find_excess((ROOT / "README.md").read_text())]
    for path in find_documents():
        faults += [f"{path.relative_to(ROOT)}:{fault}" for fault in find_faults(path, path.read_text())]
    print("\n".join(faults), end="\n" if faults else "", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
