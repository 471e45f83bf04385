"""Write what README.md says of code and results: the method table, the benchmark's headline, the file tree.

`make check` fails if they are stale.
"""

import ast
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "vestige"


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def tree() -> str:
    """Return the package's modules with a line each."""
    modules = sorted(PACKAGE.rglob("*.py"), key=lambda path: (len(path.relative_to(PACKAGE).parts), path))
    names = [path.relative_to(PACKAGE).as_posix() for path in modules]
    width = max(map(len, names)) + 2
    lines = [f"{name:<{width}}{first_line(path)}" for name, path in zip(names, modules, strict=True)]
    return "\n".join(["```", *(line.rstrip() for line in lines), "```"])


def methods() -> str:
    """Return the table of policies: name, what it keeps, default share, scale between layers."""
    from vestige.policies import POLICIES, resolve

    rows = ["| policy | keeps | needs | scale |", "| --- | --- | --- | --- |"]
    for name in POLICIES:
        policy = resolve(name)
        summary = (policy.__doc__ or "").partition("\n")[0]
        rows.append(f"| `{name}` | {summary} | {', '.join(sorted(policy.needs)) or 'keys'} | {policy.scale} |")
    return "\n".join(rows)


def bench() -> str:
    """Return the headline table of the published comparison, as its report has it."""
    report = (ROOT / "results" / "bench" / "report.md").read_text()
    found = re.search(r"^### (ruler, [^\n]* at 2,048 tokens)\n\n(.*?)\n\n", report, re.MULTILINE | re.DOTALL)
    assert found is not None, "results/bench/report.md has no headline table at 2,048 tokens"
    rows = json.loads((ROOT / "results" / "bench" / "2048" / "rows.json").read_text())["rows"]
    ours = samples(row for row in rows if "KVzip" not in row["policy"])
    kvzip = samples(row for row in rows if "KVzip" in row["policy"])
    return (
        f"`make results-bench ESSAYS=DIR`, SmolLM2-135M-Instruct, question-agnostic: {found[1]},\n"
        f"{ours} samples a task (KVzip {kvzip}). A cell is the score (95 % interval) and the bytes of the cache\n"
        "in percent of a DynamicCache's. All rows: [results/bench/report.md](results/bench/report.md).\n\n"
        f"{found[2]}"
    )


def samples(rows: Iterable[dict[str, Any]]) -> str:
    """Return how many samples the rows have: a number, or the least and the most."""
    counts = {row["n"] for row in rows}
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def fill(text: str, name: str, content: str) -> str:
    """Return the text with what stands between two markers replaced."""
    head, begin, rest = text.partition(f"<!-- {name} -->")
    _, end, tail = rest.partition(f"<!-- /{name} -->")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def main() -> int:
    """Write README.md, or with --check say whether it is up to date."""
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = fill(fill(fill(old, "methods", methods()), "bench", bench()), "tree", tree())
    if "--check" in sys.argv:
        if old != new:
            print("README.md is stale: run .venv/bin/python tools/readme.py", file=sys.stderr)
        return int(old != new)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
