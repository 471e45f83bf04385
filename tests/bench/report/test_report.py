import json
import sys
from html.parser import HTMLParser

import pytest

from tests.bench.report.rows_for_tests import RULER, dialogue_rows, many_rows, niah_rows, row, speed_rows, uneven
from vestige.bench.report import load_rows, make_report, plots, report
from vestige.bench.report.methods import KNOWN, MethodKey, assign_styles
from vestige.bench.report.rows import average_tasks, budget_key
from vestige.errors import InputError

VOID = {"meta", "input", "br", "link", "img", "hr", "path", "use", "rect", "circle", "stop"}
EVIL = "<script>alert('x')</script>"


def folder(path, rows, **more):
    path.mkdir(parents=True, exist_ok=True)
    (path / "rows.json").write_text(json.dumps({"rows": rows, **more}))
    return path


def small():
    """Return a few rows of every kind that a report has something to say about."""
    import random

    grid = {"share": "model", "kept": uneven(0.25, 1948, random.Random(0))}
    rows = []
    for task in list(RULER)[:2]:
        rows += [row(task, 2048, "full", score=0.9), row(task, 2048, "snapkv", "0.25", score=0.5)]
        rows += [row(task, 2048, "snapkv", "0.1", score=0.25), row(task, 2048, "snapkv", "0.25", **grid, score=0.6)]
        rows += [row(task, 2048, "random", "0.25", score=0.1)]
        rows += [row(task, 2048, "kvpress:SnapKVPress", "0.25", peer="kvpress:SnapKVPress", share=None, score=0.45)]
    rows.append(row("ruler/vt", 2048, "tova", "0.1", score=None, score_ci95=None, error="out of memory"))
    return rows + niah_rows((1024,))[:3] + dialogue_rows()[:2]


class Balance(HTMLParser):
    """Collects tags, and complains where they do not close."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(html):
    balance = Balance()
    balance.feed(html)
    assert not balance.open
    return balance


@pytest.fixture(scope="module")
def made():
    return make_report([*small(), *speed_rows()[:6]], commands=["vestige bench ruler --out results"])


@pytest.mark.parametrize(
    "heading",
    ["How to read this", "Headline: ruler, mean of 2 tasks at 2,048 tokens", "Accuracy against measured bytes",
     "Accuracy against decode time", "Needle in a haystack, by depth", "Dialogue, by turn",
     "What each layer and head kept", "Speed", "All rows", "Failed rows", "Provenance"],
)  # fmt: skip
def test_every_promised_section_is_in_the_page(made, heading):
    assert f">{heading}</h" in made.html


def test_the_page_closes_its_tags_shares_no_ids_and_loads_nothing(made):
    page = parsed(made.html)
    assert len(page.ids) == len(set(page.ids))
    for tag, attrs in page.tags:
        assert tag not in {"link", "img", "image", "iframe"}
        assert "src" not in attrs
        for name in ("href", "xlink:href"):
            assert attrs.get(name, "#").startswith("#")
    assert "default-src 'none'" in made.html


def test_every_picture_says_what_it_shows(made):
    pictures = [attrs for tag, attrs in parsed(made.html).tags if tag == "svg"]
    named = [attrs["aria-label"] for attrs in pictures if attrs.get("role") == "img"]
    assert len(named) > 8 and all(len(label) > 20 for label in named)
    assert all(attrs["aria-hidden"] == "true" for attrs in pictures if "role" not in attrs)
    assert any("full cache: 0.90" in label and "snapkv: 0.25 to 0.50" in label for label in named)


def test_the_same_rows_give_the_same_bytes_and_no_dates(made):
    again = make_report([*small(), *speed_rows()[:6]], commands=["vestige bench ruler --out results"])
    assert again == made
    assert "<dc:date>" not in made.html and "<metadata>" not in made.html


def test_the_markdown_has_headline_tasks_failures_and_provenance(made):
    text = made.markdown
    assert "| full | 0.90 (" in text and "are in the report.html that `vestige report` writes" in text
    for line in ("### ruler, mean of 2 tasks at 2,048 tokens", "### ruler/niah_single_1, at 2,048 tokens",
                 "## Failed rows", "| ruler/vt | 2,048 | tova | 0.1 | out of memory |", "* device: cpu, a made-up",
                 "* torch version: 2.13.0", "vestige bench ruler --out results"):  # fmt: skip
        assert line in text


def test_a_line_of_the_task_table_has_score_interval_bytes_and_time():
    line = row("ruler/vt", 1100, "snapkv", "0.25", score=0.5, score_ci95=[0.3, 0.7])
    text = make_report([line]).markdown
    # 1000 tokens x 30 layers x 3 heads x 512 bytes, a quarter of it; 30 + 25 / 4 ms
    assert "| snapkv | 0.25 | 0.500 | 0.30 to 0.70 | 20 | 25.0 % | 25.0 % | 11.52 | 36.2 |" in text


def test_bytes_not_budgets_are_reported():
    masked = row("ruler/vt", 1100, "kvpress:X", "0.25", peer="kvpress:X", kv_bytes=46_080_000, kept_fraction=1.0)
    assert "| X (kvpress) | 0.25 | 0.500 | 0.30 to 0.70 | 20 | 100.0 % | 100.0 % | 46.08 |" in (
        make_report([masked]).markdown
    )


def test_a_mean_is_only_over_methods_that_did_all_tasks():
    rows = [row("ruler/a", 512, "snapkv", "0.25", score=0.2), row("ruler/b", 512, "snapkv", "0.25", score=0.6),
            row("ruler/a", 512, "tova", "0.25", score=0.9)]  # fmt: skip
    (mean,) = average_tasks(rows)
    assert [(r["policy"], r["score"]) for r in mean.rows] == [("snapkv", pytest.approx(0.4))]
    assert [method.label for method in mean.partial] == ["tova"]


def test_the_interval_of_a_mean_adds_half_widths_in_squares():
    rows = [row("ruler/a", 512, "snapkv", "0.25", score=0.4, score_ci95=[0.1, 0.8]),
            row("ruler/b", 512, "snapkv", "0.25", score=0.6, score_ci95=[0.2, 0.9])]  # fmt: skip
    (mean,) = average_tasks(rows)
    # below sqrt(.3^2 + .4^2) / 2 = .25, above sqrt(.4^2 + .3^2) / 2 = .25
    assert mean.rows[0]["score_ci95"] == pytest.approx([0.25, 0.75])


def test_hostile_text_is_shown_and_not_run():
    fields = ("model", "policy", "task", "note", "peer", "device", "revision", "budget", "split", "share", "memory")
    evil = row("ruler/vt", 512, "tova", "0.1") | {field: EVIL for field in fields}
    broken = row("ruler/vt", 512, "tova", "0.1", score=None, error=EVIL)
    made = make_report([row("ruler/vt", 512, "snapkv", "0.25"), evil, broken], title=EVIL, commands=[f"vestige {EVIL}"])
    assert EVIL not in made.html and made.html.count("&lt;script&gt;") > len(fields)
    assert sum(tag == "script" for tag, _ in parsed(made.html).tags) == 1
    outside = "\n".join(part for i, part in enumerate(made.markdown.split("```")) if i % 2 == 0)
    assert EVIL not in outside


def test_labels_with_dollars_and_control_characters_are_drawn_as_they_are():
    made = make_report([row("ruler/$x^$ \x00\x07", 512, "$\\frac$", "0.25"), row("ruler/中文", 512, "tova", "0.1")])
    assert "$\\frac$" in made.html and "中文" in made.html
    assert "\x07" not in "".join(s for s in made.html.split("<svg")[1:] if "role" in s[:200]).partition("</svg>")[0]


OPTIONAL = ["share", "memory", "peer", "split", "question_aware", "model", "chunk", "batch", "seed", "score_ci95", "n",
            "kept_fraction", "held", "full", "kv_bytes", "peak_kv_bytes", "full_kv_bytes", "memory_bytes", "prefill_s",
            "evict_s", "decode_ms", "parts", "turns", "kept", "revision", "versions", "device", "dtype", "note",
            "length"]  # fmt: skip


def test_rows_may_lack_any_optional_field():
    whole = row("ruler/vt", 512, "snapkv", "0.25")
    lacking = {key: value for key, value in whole.items() if key not in OPTIONAL}
    assert set(lacking) == {"task", "policy", "budget", "score"}
    made = make_report([lacking, whole | dict.fromkeys(OPTIONAL) | {"policy": "tova"}])
    assert "snapkv" in made.html and "tova" in made.markdown


def test_a_report_of_failed_rows_alone_lists_them():
    made = make_report([row("ruler/vt", 512, "tova", "0.1", score=None, error="no room"),
                        row("ruler/vt", 512, "tova", "0.2", score=None)])  # fmt: skip
    assert "no room" in made.html and "nothing was measured" in made.markdown
    assert "All rows" not in made.html


def test_a_speed_row_that_failed_is_listed():
    made = make_report([*speed_rows()[:2], {"length": 9, "batch": 1, "policy": "p", "peer": "p", "error": "no room"}])
    assert "| speed | 9 | p |" in made.markdown and "no room" in made.html


def test_a_picture_that_stands_alone_names_its_lines():
    method = MethodKey(policy="kvzip(share=model)", share="model")
    line = plots.Line(label=method.label, style=assign_styles([method])[method], points=(plots.Point(x=1, y=0.5),))
    bare, named = (plots.draw_line_chart("t", [line], plots.Axis(label="x"), legend=legend) for legend in (False, True))
    assert ">kvzip(share=model)<" in named and ">kvzip(share=model)<" not in bare
    assert method.family == "kvzip" and line.style.color == KNOWN["kvzip"][0]


def test_runs_that_differ_in_protocol_share_no_picture():
    rows = [row("ruler/vt", 512, "snapkv", "0.25"), row("ruler/vt", 512, "snapkv", "0.25", question_aware=True)]
    made = make_report(rows)
    for chapter in ("question-agnostic, seed 0", "question-aware, seed 0"):
        assert f"smollm2-135m, test split, {chapter}</h2>" in made.html


def test_method_names_say_share_memory_and_package():
    def label(**fields):
        return MethodKey.of(fields).label

    assert label(policy="snapkv", share="head") == "snapkv"
    assert label(policy="snapkv", share="model", memory="moments") == "snapkv, share model + moments"
    assert label(policy="x", peer="kvpress:SnapKVPress") == "SnapKV (kvpress)"


def test_twins_share_a_colour_and_differ_in_dash_and_controls_are_grey():
    ours, theirs = MethodKey(policy="streaming_llm"), MethodKey(policy="x", peer="kvpress:StreamingLLMPress")
    snapkv, twin = MethodKey(policy="snapkv", share="model"), MethodKey(policy="y", peer="kvpress:SnapKVPress")
    drawn = assign_styles([ours, theirs, snapkv, twin])
    assert drawn[snapkv].color == drawn[twin].color == "#0072B2"
    assert (drawn[snapkv].dashed, drawn[twin].dashed) == (False, True)
    assert drawn[snapkv].fillstyle == "full" and drawn[twin].fillstyle == "none"
    assert ours.kind == theirs.kind == "control" and not drawn[ours].strong
    assert list(drawn)[:2] == [snapkv, twin]


def test_methods_without_a_place_of_their_own_still_look_different():
    drawn = assign_styles(MethodKey(policy=f"new{i}") for i in range(20))
    assert len({(style.color, style.marker) for style in drawn.values()}) == 20


def test_budgets_are_sorted_fractions_tokens_bytes_downwards():
    assert sorted(["64MB", "0.1", "512", "1.0", "0.25", "1024"], key=budget_key) == [
        "1.0", "0.25", "0.1", "1024", "512", "64MB"
    ]  # fmt: skip


def test_folders_are_read_one_level_deep_in_order(tmp_path):
    folder(tmp_path / "b", [row("ruler/b", 512, "full")])
    folder(tmp_path / "a", [row("ruler/a", 512, "full")])
    folder(tmp_path / "a" / "deep", [row("ruler/deep", 512, "full")])
    (tmp_path / "empty").mkdir()
    assert [r["task"] for r in load_rows([tmp_path])] == ["ruler/a", "ruler/b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "rows.json is not JSON"),
        ("[]", r"rows.json is not a result file: expected an object"),
        ('{"rows": [{"task": "x"}]}', "row 0 has no policy"),
        ('{"rows": [{"policy": "x"}]}', "row 0 has no task"),
        ('{"rows": []}', "no rows in .*vestige bench"),
    ],
)
def test_a_malformed_file_is_named_with_its_problem(tmp_path, text, message):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(InputError, match=message):
        report([tmp_path])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_numbers_that_are_not_finite_count_as_missing(tmp_path):
    folder(tmp_path, [row("ruler/vt", 512, "snapkv", "0.25", score=float("nan"), error="nan")])
    (line,) = load_rows([tmp_path])
    assert line["score"] is None


def test_a_folder_without_results_says_what_makes_them(tmp_path):
    with pytest.raises(InputError, match=r"no results in .*: expected rows.json; run `vestige bench \.\.\. --out DIR`"):
        report([tmp_path])
    with pytest.raises(InputError, match="no such folder"):
        report([tmp_path / "gone"])
    with pytest.raises(InputError, match="no folder given"):
        report([])


def test_files_go_to_the_first_folder_or_to_out_and_are_replaced_whole(tmp_path):
    first = folder(tmp_path / "a", [row("ruler/vt", 512, "snapkv", "0.25")], command="vestige bench ruler")
    second = folder(tmp_path / "b", [row("ruler/vt", 512, "tova", "0.25")])
    (first / "report.html").write_text("old")
    written = report([first, second])
    assert written.html == first / "report.html" and written.markdown == first / "report.md" and written.rows == 2
    assert "tova" in written.html.read_text() and "vestige bench ruler" in written.markdown.read_text()
    assert str(tmp_path) not in written.html.read_text() + written.markdown.read_text()
    assert sorted(p.name for p in first.iterdir()) == ["report.html", "report.md", "rows.json"]
    assert report([second], out=tmp_path / "new" / "place").html == tmp_path / "new" / "place" / "report.html"
    with pytest.raises(InputError, match="is a file"):
        report([second], out=second / "rows.json")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_a_package_the_pip_line_is_given_and_nothing_is_written(tmp_path, monkeypatch, package):
    place = folder(tmp_path / "a", [row("ruler/vt", 512, "snapkv", "0.25")])
    from vestige.bench.report import plots

    plots.draw_swatch.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r'pip install "vestige\[bench\]"'):
        report([place])
    assert [p.name for p in place.iterdir()] == ["rows.json"]


def test_the_made_up_run_is_as_large_as_the_real_one():
    rows = many_rows()
    assert len(rows) > 230
    assert sum(r.get("error") is not None for r in rows) == 5
