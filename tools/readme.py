"""Write what README.md says of code and results: the method table, the benchmark's headline, the file tree.

`make check` fails if they are stale.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "vestige"


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def tree() -> str:
    """Return the package's modules with a line each."""
    modules = sorted(PACKAGE.rglob("*.py"), key=lambda path: (len(path.relative_to(PACKAGE).parts), path))
    lines = [f"{path.relative_to(PACKAGE).as_posix():<28}{first_line(path)}" for path in modules]
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
    title, _, rest = report.partition("\n### ")[2].partition("\n\n")
    table = rest.partition("\n\n")[0]
    return (
        f"`make results-bench ESSAYS=DIR`, SmolLM2-135M-Instruct: {title}. A cell is the score (95 % interval) and the bytes of the\n"
        f"cache in percent of a DynamicCache's. All rows: [results/bench/report.md](results/bench/report.md).\n\n{table}"
    )


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
