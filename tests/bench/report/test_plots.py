import re

import pytest

from vestige.bench.report import plots
from vestige.bench.report.figure import separate_ids
from vestige.bench.report.methods import MethodKey, assign_styles
from vestige.bench.report.plots import Axis, Line, Point

SNAPKV, TWIN = MethodKey(policy="snapkv", share="model"), MethodKey(policy="x", peer="kvpress:SnapKVPress")
STYLES = assign_styles([SNAPKV, TWIN])
BYTES = Axis(label="bytes", log=True, percent=True)


def line(method=SNAPKV, *points):
    return Line(label=method.label, style=STYLES[method], points=points or (Point(x=0.1, y=0.3, interval=(0.1, 0.5)),))


def words(svg):
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_text_stays_text_and_ticks_are_measured_percents():
    points = Point(x=0.05, y=0.2), Point(x=0.5, y=0.6)
    svg = plots.draw_line_chart("ruler/vt", [line(SNAPKV, *points)], BYTES)
    shown = words(svg)
    assert "ruler/vt" in shown and "score" in shown and "bytes" in shown
    assert [text for text in shown if "%" in text] == ["5 %", "10 %", "20 %", "50 %"]


def test_a_picture_scales_and_has_no_metadata():
    svg = plots.draw_line_chart("t", [line()], BYTES)
    assert re.match(r'<svg [^>]*viewBox="0 0 [\d.]+ [\d.]+"[^>]*role="img"', svg) and svg.rstrip().endswith("</svg>")
    assert "<metadata" not in svg and "<?xml" not in svg and "<style" not in svg


def test_strong_lines_have_intervals_and_weak_ones_do_not():
    ours, theirs = plots.draw_line_chart("t", [line()], BYTES), plots.draw_line_chart("t", [line(TWIN)], BYTES)
    color = STYLES[SNAPKV].color.lower()
    with_interval = len(re.findall(rf"stroke: {color}; stroke-opacity: 0.55", ours))
    assert with_interval == 1
    assert len(re.findall(r"stroke-opacity: 0.55", theirs)) == 0


def test_a_peer_is_dashed():
    two = Point(x=0.1, y=0.3), Point(x=0.2, y=0.4)
    assert "stroke-dasharray" in plots.draw_line_chart("t", [line(TWIN, *two)], BYTES)
    assert "stroke-dasharray" not in plots.draw_line_chart("t", [line(SNAPKV, *two)], BYTES)


def test_a_heat_map_writes_its_numbers_and_leaves_gaps_empty():
    svg = plots.draw_heat_map(
        "snapkv", [[0.25, None], [1.0, 0.0]], ["0 %", "100 %"], ["512", "1,024"], ("depth", "length")
    )
    assert [text for text in words(svg) if re.fullmatch(r"\d\.\d\d", text)] == ["0.25", "1.00", "0.00"]
    assert "<image" not in svg
    assert "0 %: 0.25, none; 100 %: 1.00, 0.00" in svg


def test_what_layers_kept_is_said_and_drawn_as_shapes():
    svg = plots.draw_kept_map("snapkv", [[0.1, 0.3], [0.5, 0.7]])
    assert "Mean kept by layer: 20%, 60%" in svg and "40.0 %" in " ".join(words(svg))
    assert {"0", "1", "layer", "KV head", "kept"} <= set(words(svg))


def test_a_kept_map_takes_layers_of_different_heads_and_many_heads():
    assert "KV head" in words(plots.draw_kept_map("x", [[0.1], [0.2, 0.4]]))
    assert "KV head" in words(plots.draw_kept_map("x", [[0.1] * 40, [0.3] * 40]))


def test_a_list_of_methods_has_their_names_and_notes():
    svg = plots.draw_dot_chart("t", [line(), line(TWIN)], ["25 % bytes", "100 % bytes"], level=Point(x=1, y=0.9))
    assert {"snapkv, share model", "SnapKV (kvpress)", "25 % bytes", "100 % bytes"} <= set(words(svg))


@pytest.mark.parametrize("x", [0.0, 3.0, -2.0])
def test_one_point_is_enough_for_a_picture(x):
    assert "<svg" in plots.draw_line_chart("t", [line(SNAPKV, Point(x=x, y=0.5))], Axis(label="ms"))


def test_ids_of_two_pictures_on_a_page_differ_and_still_refer_to_each_other():
    one = plots.draw_line_chart("t", [line()], BYTES)
    page = separate_ids(f"{one}<p>url(#keep)</p>{one}")
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) and ids
    assert "url(#keep)" in page
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) - {"keep"} <= set(ids)


def test_a_long_title_is_broken_into_lines():
    svg = plots.draw_heat_map(
        "a method of a very long name at budget 0.25", [[0.5]], ["0 %"], ["512"], ("depth", "length")
    )
    title = [text for text in words(svg) if "method" in text or "budget" in text]
    assert len(title) == 2
