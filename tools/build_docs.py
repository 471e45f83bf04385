"""Write the generated parts of the documents: tables of methods and results, the command line, the tree of modules.

A generated part stands between two comments, ``<!-- NAME -->`` and ``<!-- /NAME -->``. ``tools/check_docs.py`` fails if
one of them is stale.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "vestige"


def read_summary(path: Path) -> str:
    """Return the first line of a module's docstring, as Markdown."""
    line = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    return translate_markup(line)


def translate_markup(line: str) -> str:
    """Return a line of a docstring as Markdown: code in single quotes, references as code."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", line.replace("``", "`")).replace("|", "\\|")


def build_tree() -> str:
    """Return the packages of vestige, each with its modules and a line about each module."""
    packages = sorted({path.parent for path in PACKAGE.rglob("*.py")})
    return "\n\n".join(_list_modules(package) for package in packages)


def _list_modules(package: Path) -> str:
    modules = [path for path in sorted(package.glob("*.py")) if path.name != "__init__.py"]
    name = ".".join(package.relative_to(PACKAGE.parent).parts)
    level = "#" * (2 + len(package.relative_to(PACKAGE.parent).parts[:2]))
    rows = [f"| `{path.stem}` | {read_summary(path)} |" for path in modules]
    table = ["", "| module | content |", "| --- | --- |", *rows] if rows else []
    return "\n".join([f"{level} `{name}`", "", *wrap(read_summary(package / "__init__.py")), *table])


def build_methods() -> str:
    """Return the table of policies: name, what it keeps, what it needs, its scale between layers."""
    from vestige.policies import POLICIES, resolve

    rows = ["| policy | keeps | needs | scale |", "| --- | --- | --- | --- |"]
    for name in POLICIES:
        policy = resolve(name)
        summary = translate_markup((policy.__doc__ or "").partition("\n")[0])
        rows.append(f"| `{name}` | {summary} | {', '.join(sorted(policy.needs)) or 'keys'} | {policy.scale} |")
    return "\n".join(rows)


def build_bench() -> str:
    """Return the headline table of the published comparison, as its report has it."""
    report = (ROOT / "results" / "bench" / "report.md").read_text()
    found = re.search(r"^### (ruler, [^\n]* at 2,048 tokens)\n\n(.*?)\n\n", report, re.MULTILINE | re.DOTALL)
    assert found is not None, "results/bench/report.md has no headline table at 2,048 tokens"
    rows = json.loads((ROOT / "results" / "bench" / "2048" / "rows.json").read_text())["rows"]
    others = describe_counts(row for row in rows if "KVzip" not in row["policy"])
    kvzip = describe_counts(row for row in rows if "KVzip" in row["policy"])
    heading = (
        f"SmolLM2-135M-Instruct, question-agnostic: {found[1]}, {others} samples a task (KVzip {kvzip}). A cell is the "
        "score (95 % interval) and the bytes of the cache in percent of a DynamicCache's."
    )
    return "\n".join([*wrap(heading), "", found[2]])


def describe_counts(rows: Iterable[dict[str, Any]]) -> str:
    """Return how many samples the rows have: a number, or the least and the most."""
    counts = {row["n"] for row in rows}
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def build_cli() -> str:
    """Return every command of the command line with its options, as ``--help`` explains them."""
    import typer

    from vestige.cli.main import app

    return "\n\n".join(_list_commands(typer.main.get_command(app), "vestige"))


def _list_commands(command: Any, name: str) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    if not inner or command.callback is not None:
        yield _describe_command(command, name)
    for word, below in inner.items():
        yield from _list_commands(below, f"{name} {word}")


def _describe_command(command: Any, name: str) -> str:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    usage = " ".join([name, *map(_name_argument, arguments)])
    rows = [_describe_parameter(param) for param in command.params]
    table = ["", "| option | default | meaning |", "| --- | --- | --- |", *rows] if rows else []
    return "\n".join([f"### `{usage}`", "", *wrap(" ".join((command.help or "").split())), *table])


def _describe_parameter(param: Any) -> str:
    default = param.default() if callable(param.default) else param.default
    hidden = default is None or default is False or default in ((), [], "") or "Sentinel" in repr(default)
    is_argument = param.param_type_name == "argument"
    names = [_name_argument(param)] if is_argument else [*param.opts, *param.secondary_opts]
    words = [", ".join(f"`{name}`" for name in names), "" if hidden else f"`{default}`", " ".join(param.help.split())]
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"


def _name_argument(param: Any) -> str:
    name = param.metavar or param.name.upper()
    return f"{name}..." if param.nargs == -1 and not name.endswith("...") else name


def wrap(text: str, width: int = 100) -> list[str]:
    """Return the text as lines of at most ``width`` characters."""
    import textwrap

    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def build_names() -> str:
    """Return the names of all policies."""
    from vestige.policies import POLICIES

    return "\n".join(wrap(", ".join(f"`{name}`" for name in POLICIES) + "."))


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"policies": build_names},
    "docs/methods.md": {"methods": build_methods},
    "docs/benchmarks.md": {"bench": build_bench},
    "docs/cli.md": {"commands": build_cli},
    "docs/architecture.md": {"tree": build_tree},
}
"""Generated parts by document and marker."""


def replace_part(text: str, name: str, content: str) -> str:
    """Return the text with the lines between the two markers of a part replaced."""
    head, begin, rest = text.partition(f"<!-- {name} -->")
    _, end, tail = rest.partition(f"<!-- /{name} -->")
    assert end, f"no part named {name}"
    return f"{head}{begin}\n\n{content}\n\n{end}{tail}"


def build(document: str) -> str:
    """Return a document with its generated parts fresh."""
    text = (ROOT / document).read_text()
    for name, make in PARTS[document].items():
        text = replace_part(text, name, make())
    return text


if __name__ == "__main__":
    for document in PARTS:
        (ROOT / document).write_text(build(document))
