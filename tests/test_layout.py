"""The layout of the tests mirrors the layout of the code."""

import ast
from pathlib import Path

SOURCE, TESTS = Path(__file__).parents[1] / "src" / "vestige", Path(__file__).parent

TESTED_ELSEWHERE = {}
"""Modules that no test file of their own folder names, and the test file that exercises them."""


def modules() -> dict[str, Path]:
    """Return the modules of the package, by path below it without the ending."""
    files = [path for path in SOURCE.rglob("*.py") if not path.name.startswith("__")]
    return {path.relative_to(SOURCE).with_suffix("").as_posix(): path for path in files}


def names_in(path: Path) -> set[str]:
    """Return the modules that a test file imports or names in a string, with dots."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def has_tests(module: str) -> bool:
    """Return whether a module has a test file of its name, or one in the same folder that imports it."""
    folder, _, name = module.rpartition("/")
    if (TESTS / folder / f"test_{name}.py").exists():
        return True
    dotted = "vestige." + module.replace("/", ".")
    return any(dotted in names_in(path) for path in (TESTS / folder).glob("test_*.py"))


def test_every_module_has_its_test_file_or_is_on_the_list():
    missing = {module for module in modules() if not has_tests(module)}
    assert missing == set(TESTED_ELSEWHERE)


def test_what_is_tested_elsewhere_is_tested_there():
    assert all((TESTS / path).is_file() for path in TESTED_ELSEWHERE.values())


def test_the_top_of_the_package_is_small():
    top = [path for path in SOURCE.iterdir() if not path.name.startswith(("__pycache__", "."))]
    packages = [path for path in top if path.is_dir()]
    assert len(packages) <= 14 and len([path for path in top if path.suffix == ".py"]) <= 6 + 1  # and __main__
