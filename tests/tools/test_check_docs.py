"""Faults that the check of the documents finds: long lines, dead links, missing headings."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def check_docs(monkeypatch):
    """The script, which imports its neighbour as scripts do."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    import check_docs

    yield check_docs
    for name in ("check_docs", "build_docs"):
        sys.modules.pop(name, None)


def test_long_lines_are_faults_outside_tables_fences_and_lone_links(check_docs, tmp_path):
    path, long = tmp_path / "page.md", "x" * 101
    path.write_text("")
    lines = ["| " + long, "```", long, "```", f"[page]({path.name}#{'x' * 90})", long]
    found = list(check_docs.find_faults(path, "\n".join([*lines, f"# {'x' * 90}"])))
    assert found[-1] == "6: 101 characters, more than 100"


def test_links_must_lead_to_files_and_headings(check_docs, tmp_path):
    (tmp_path / "other.md").write_text("# A `b` (c), d\n\n## Twice\n\n## Twice\n")
    good = "[a](other.md) [b](other.md#a-b-c-d) [c](other.md#twice-1) [d](https://nowhere.example/x) ![e](other.md)"
    assert list(check_docs.find_faults(tmp_path / "page.md", good.replace(" [", "\n["))) == []
    bad = "[a](none.md)\n[b](other.md#thrice)\n"
    assert list(check_docs.find_faults(tmp_path / "page.md", bad)) == [
        "1: no such file: none.md",
        "2: no such heading: other.md#thrice",
    ]


def test_a_readme_that_grew_too_long_is_a_fault(check_docs):
    assert list(check_docs.find_excess("a\n" * 150)) == []
    assert list(check_docs.find_excess("a\n" * 151)) == ["README.md: 151 lines and 302 bytes; at most 150 and 9000"]
    assert len(list(check_docs.find_excess("a" * 9001))) == 1


def test_a_generated_part_is_replaced_between_its_markers(check_docs):
    import build_docs

    text = "before\n<!-- part -->\nold\n<!-- /part -->\nafter\n"
    assert build_docs.replace_part(text, "part", "new") == "before\n<!-- part -->\n\nnew\n\n<!-- /part -->\nafter\n"
    assert build_docs.translate_markup("See :mod:`vestige.cache`, ``x | y``.") == r"See `vestige.cache`, `x \| y`."
