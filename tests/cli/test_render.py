"""What people see fits 80 columns and shows the numbers as they are."""

import io
import json

import pytest
from rich.console import Console

from vestige.cache.report import LayerReport, Report
from vestige.cli import render

QUESTION = "Who keeps lamp 16?"
EVICT = ("--policy", "streaming_llm", "--budget", "48", "--max-new-tokens", "8")


def report(**changes) -> Report:
    layers = tuple(LayerReport(i, (800 - 20 * i, 400, 100 + i), 8000) for i in range(30))
    defaults = {
        "seen": (8000,), "held": 36_000, "full": 720_000, "kv_bytes": 12_345_678, "peak_kv_bytes": 23_456_789,
        "full_kv_bytes": 184_320_000, "other_kv_bytes": 0, "memory_bytes": 0, "evict_s": 0.25, "budget_total": 36_000,
        "policy": "SnapKV", "share": "head", "layers": layers,
    }  # fmt: skip
    return Report(**(defaults | changes))


def rendered(*parts, width: int = 80) -> str:
    """Return what a console of 80 columns shows."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(*parts, sep="\n")
    text = console.file.getvalue()
    assert max(map(len, text.splitlines()), default=0) <= width
    return text


def test_the_table_of_a_report_has_its_numbers():
    text = " ".join(rendered(render.report_table(report(), prefill_s=6.789, tokens_per_s=27.44)).split())
    for words in (
        "tokens read 8,000",
        "36,000 of 720,000 (5.0%), budget 36,000 pairs",
        "12.3 MB instead of 184.3 MB",
        "23.5 MB",
        "6.79 s, of which 0.25 s evicting",
        "27.4 tokens/s",
        "SnapKV, share head",
    ):
        assert words in text, words
    assert "other layers" not in text


def test_other_layers_are_shown_if_there_are_any_and_no_budget_is_said_so():
    numbers = report(other_kv_bytes=1_000_000, budget_total=None)
    text = " ".join(rendered(render.report_table(numbers, prefill_s=0.0, tokens_per_s=0.0)).split())
    assert "other layers 1.0 MB" in text and "budget none" in text


def test_the_picture_has_a_bar_for_each_layer():
    text = rendered(render.layers_picture(report()))
    lines = text.splitlines()
    assert len([line for line in lines if "·" in line]) == 30
    first = next(line for line in lines if line.split()[:1] == ["0"])
    assert first.count("·") + first.partition("·")[0].count("█") == 40
    assert "433" in first and first.rstrip().endswith("█▄▁")


def test_the_picture_of_all_and_of_nothing():
    full = rendered(render.layers_picture(report(layers=(LayerReport(0, (8000,) * 3, 8000),))))
    assert "█" * 40 in full and "·" not in full
    empty = rendered(render.layers_picture(report(layers=(LayerReport(0, (), 0), LayerReport(1, (0, 0), 5)))))
    assert "·" * 40 in empty
    rendered(render.layers_picture(report(layers=())))


def test_the_picture_of_many_rows_fits():
    rendered(render.layers_picture(report(layers=(LayerReport(0, tuple(range(100)), 100),))))


@pytest.mark.parametrize(("count", "words"), [(0, "0.0 MB"), (1_234_567_890, "1,234.6 MB"), (5e5, "0.5 MB")])
def test_bytes_as_people_read_them(count, words):
    assert render.megabytes(count) == words


def test_a_table_of_rows_formats_each_column_and_leaves_gaps():
    rows = [{"length": 8000, "decode_ms": 38.26, "policy": "streaming_llm"}, {"length": 60, "decode_ms": None}]
    lines = rendered(render.rows_table(rows, {"length": "d", "decode_ms": ".1f", "policy": "s"})).splitlines()
    assert lines[0].split() == ["length", "decode", "ms", "policy"]
    assert lines[1].split() == ["8000", "38.3", "streaming_llm"]
    assert lines[2].split() == ["60"]


def test_markup_in_values_is_shown_as_it_is():
    assert "[red]x[/red]" in rendered(render.rows_table([{"policy": "[red]x[/red]"}], {"policy": "s"}))


@pytest.mark.parametrize("terminal", [False, True])
def test_the_reading_bar_leaves_nothing_where_there_is_no_terminal(terminal):
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal)
    with render.reading_bar(console) as advance:
        advance(512, 2048)
        advance(2048, 2048)
    said = console.file.getvalue()
    assert ("reading" in said) == terminal
    assert terminal or said == ""


def test_the_reading_bar_goes_away_when_reading_fails():
    console = Console(file=io.StringIO(), width=80)
    with pytest.raises(ValueError, match="broken"), render.reading_bar(console):
        raise ValueError("broken")
    assert console.file.getvalue() == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_the_training_bar_tells_parts_of_the_loss_and_the_latest_validation(terminal):
    console = Console(file=io.StringIO(), width=160, force_terminal=terminal)
    with render.training_bar(console) as tell:
        tell(41, 100, {"step": 41, "loss": 0.5, "kl": 0.25, "lr": 1e-3, "seconds": 1.5, "validation": {"exact": 0.75}})
        tell(42, 100, {"step": 42, "loss": None, "kl": 0.125, "lr": 1e-3, "seconds": 1.5})
    said = console.file.getvalue()
    assert ("42/100" in said) == terminal and terminal == ("loss - kl 0.125 lr 0.001 | exact 0.75" in said)
    assert terminal or said == ""


def test_without_json_the_output_is_for_people_and_has_the_numbers(vestige, folders, place):
    base = ("run", "--model", folders.chat, "--context", "story.txt", "--question", QUESTION, *EVICT)
    row, result = vestige(*base, "--json").row, vestige(*base)
    assert result.code == 0
    with pytest.raises(ValueError):
        json.loads(result.out.splitlines()[-1])
    assert "{" not in result.out.replace(row["answer"], "")
    for words in (QUESTION, f"{row['seen']:,}", f"{row['held']:,} of {row['seen'] * 6:,}", "tokens/s", "share head"):
        assert words in result.out, words
    assert max(map(len, result.out.splitlines())) <= 80


def test_people_see_questions_and_answers_as_they_are(vestige, folders, place):
    asked = "Is [bold]x[/bold] a :cat: or [/red] \\[y]?"
    result = vestige("run", "--model", folders.chat, "--prompt", "a cat", "--question", asked, "--max-new-tokens", "8")
    assert result.code == 0 and asked in result.out


def test_demo_shows_the_main_job_and_its_json(vestige, folders, monkeypatch, place):
    from vestige.cli import demo
    from vestige.models.loading import load

    class Document:
        """The short story in the place of the shipped document."""

        def __truediv__(self, name: str):
            return place / "story.txt" if name == demo.DOCUMENT else self

    asked: list[str] = []

    def tiny_load(name: str, **options: object):
        asked.append(name)
        return load(folders.chat)

    monkeypatch.setattr(demo, "load", tiny_load)
    monkeypatch.setattr(demo, "files", lambda package: Document())
    monkeypatch.setattr(demo, "ERASER", "shift")  # no eraser is trained for the tiny model
    result = vestige("demo")
    assert result.code == 0 and asked == ["smollm2-135m"]
    shown = ("every pair kept:", "tokens/s", "without eviction", "pairs held", "layer", "stale line erased:")
    for words in (*demo.QUESTIONS, *shown, demo.NOTE_QUESTION):
        assert words in result.out, words
    row = vestige("demo", "--json").row
    assert {"answer", "held", "peak_kv_bytes", "untouched_answer", "erased_answer", "edit_s"} <= set(row)
    assert (row["policy"], row["budget"]) == (demo.POLICY, demo.BUDGET)
    assert 0 < row["kept_fraction"] < 1 and len(row["full_answers"]) == len(row["answers"]) == len(demo.QUESTIONS)


def test_a_demo_without_its_model_is_one_line(vestige, monkeypatch):
    from vestige import ModelError
    from vestige.cli import demo

    def offline(*_: object, **__: object) -> None:
        raise ModelError("cannot download smollm2-135m: the package index could not be reached")

    monkeypatch.setattr(demo, "load", offline)
    assert "cannot download smollm2-135m" in vestige("demo").complaint()


def test_the_shipped_document_is_long_enough_for_the_main_job():
    from importlib.resources import files

    from vestige.cli import demo

    text = (files("vestige") / "data" / demo.DOCUMENT).read_text(encoding="utf-8")
    assert len(text.split()) > 4500  # at least 6,000 tokens, by a wide margin at 4/3 a word


def bench_row(**changes) -> dict:
    made = {
        "task": "ruler/niah_multikey_1", "length": 2048, "policy": "snapkv", "share": "head", "budget": "0.25",
        "peer": None, "score": 0.5, "score_ci95": [0.2993, 0.7007], "n": 20, "kept_fraction": 0.2496,
        "kv_bytes": 12_345_678, "decode_ms": 41.25,
    }  # fmt: skip
    return made | changes


def bench_text(*rows: dict) -> str:
    return rendered(render.bench_table(rows))


def test_a_bench_row_shows_score_interval_size_and_time():
    line = bench_text(bench_row()).splitlines()[-1]
    assert " ".join(line.split()) == "ruler/niah_multikey_1 2048 snapkv 0.25 0.50 0.30-0.70 20 25.0% 12.3 41.2"


def test_a_share_that_is_not_per_head_and_a_missing_time_can_be_seen():
    named = {"task": "niah"}
    text = bench_text(bench_row(share="model", **named), bench_row(share=None, decode_ms=None, **named))
    first, second = text.splitlines()[-2:]
    assert "snapkv:model" in first and second.split()[-1] == "12.3" and "snapkv:" not in second


def test_a_failed_bench_row_says_so_in_place_of_numbers():
    failed = {key: bench_row()[key] for key in ("task", "length", "policy", "share", "budget", "peer")}
    text = bench_text(bench_row(), failed | {"score": None, "error": "no room [/b]"})
    assert text.splitlines()[-1].split() == ["ruler/niah_multikey_1", "2048", "snapkv", "0.25", "failed"]


def test_a_bench_table_fits_80_columns_and_hides_no_name():
    peer = "kvpress:ComposedPress([KnormPress(), SnapKVPress()])"
    rows = [bench_row(task="[b]lamps", policy=peer, share=None), bench_row()]
    narrow, wide = bench_text(*rows), rendered(render.bench_table(rows), width=160)
    for word in ("[b]lamps", "0.30-0.70", "41.2"):
        assert word in narrow and word in wide, word
    assert peer in wide and "…" not in narrow  # long names go on in the next line
