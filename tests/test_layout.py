"""The layout of the tests mirrors the layout of the code."""

import ast
from pathlib import Path

from vestige.erasers import ERASERS
from vestige.memory import MEMORIES
from vestige.policies import POLICIES

SOURCE, TESTS = Path(__file__).parents[1] / "src" / "vestige", Path(__file__).parent

TESTED_THROUGH = {
    "bench/erasing/test_tasks.py": ("bench/erasing/needles",),
    "bench/methods/test_peers.py": tuple(
        f"bench/methods/peers/{name}" for name in ("base", "caches", "names", "presses", "process")
    ),
    "bench/metrics/test_scores.py": ("bench/metrics/byte_meter", "bench/metrics/text_overlap"),
    "bench/report/test_report.py": tuple(f"bench/report/{name}" for name in ("lines", "page", "sections", "tables")),
    "bench/tasks/longbench/test_samples.py": ("bench/hub", "bench/tasks/longbench/data"),
    "bench/tasks/ruler/test_suite.py": (
        "bench/tasks/questions",
        "bench/tasks/fitting",
        *(f"bench/tasks/ruler/{name}" for name in ("qa", "variable_tracking", "word_counts")),
    ),
    "bench/test_runner.py": ("bench/run",),
    "cache/test_evicting_equals_masking.py": ("cache/evict", "cache/storage"),
    "cache/test_kv_cache.py": ("cache/forward_pass", "cache/other_layers", "cache/token_history"),
    "cli/test_main.py": ("cli/chat", "cli/options"),
    "cli/test_train_retention.py": ("cli/train",),
    "erasers/test_erase.py": ("cache/edits", "erasers/base", "erasers/replay"),
    "erasers/test_learned.py": ("cache/overlay", "nn/lora"),
    "pipelines/test_document_qa.py": ("pipelines/answer",),
    "policies/test_base.py": ("cache/observers",),
    "text/test_files.py": ("text/jsonl", "utils/files"),
    "training/data/test_documents.py": ("training/data/decontamination", "training/data/sentences"),
    "training/data/test_synthetic_qa.py": tuple(
        f"training/data/synthetic_qa/{name}" for name in ("sequences", "story", "task", "validation")
    ),
    "training/eraser/test_samples.py": ("training/eraser/templates",),
    "training/test_loop.py": ("training/task",),
    "cli/test_train_runs.py": ("training/trainer", "utils/timing"),
}
"""Test files, and the modules that they exercise without naming them: the short list."""


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


def registered() -> set[str]:
    """Return the modules of named policies, memories and erasers: the suites of each kind run over all names."""
    paths = [*POLICIES.values(), *MEMORIES.values(), *ERASERS.values()]
    return {path.partition(":")[0].removeprefix("vestige.").replace(".", "/") for path in paths if path}


def test_every_module_has_its_test_file_or_is_on_the_list():
    missing = {module for module in modules() if not has_tests(module)} - registered()
    assert missing == {module for tested in TESTED_THROUGH.values() for module in tested}


def test_the_test_files_on_the_list_exist():
    assert all((TESTS / path).is_file() for path in TESTED_THROUGH)


def test_the_top_of_the_package_is_small():
    top = [path for path in SOURCE.iterdir() if not path.name.startswith(("__pycache__", "."))]
    packages = [path for path in top if path.is_dir()]
    assert len(packages) <= 14 and len([path for path in top if path.suffix == ".py"]) <= 6
