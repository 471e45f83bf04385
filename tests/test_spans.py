"""Half-open ranges of positions."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vestige import InputError, Span
from vestige.spans import PositionMap, within


def test_a_span_is_as_long_as_its_end_is_far_from_its_start():
    assert len(Span(3, 7)) == 4
    assert len(Span(0, 1)) == 1


@pytest.mark.parametrize(("start", "end"), [(0, 0), (3, 3), (4, 3), (-1, 2), (-3, -1)])
def test_an_empty_or_negative_range_is_refused_with_both_numbers(start, end):
    with pytest.raises(InputError) as refusal:
        Span(start, end)
    assert f"[{start}, {end})" in str(refusal.value)


def test_spans_sort_by_start_and_then_by_end():
    assert sorted([Span(5, 6), Span(1, 9), Span(1, 3)]) == [Span(1, 3), Span(1, 9), Span(5, 6)]


def test_a_span_cannot_be_changed_and_can_be_a_key():
    span = Span(1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        span.end = 3
    assert {span: "fact"}[Span(1, 2)] == "fact"


# What leaves, and where the rest goes.

SPANS = st.sets(st.integers(0, 29), max_size=12).map(lambda chosen: tuple(Span(i, i + 1) for i in sorted(chosen)))


@given(SPANS)
def test_what_stays_is_numbered_anew_without_holes(spans):
    positions = torch.arange(30)
    left = positions[~within(positions, spans)]
    closing = PositionMap(spans)
    assert closing.moved(left).tolist() == list(range(len(left))) and closing.removed == 30 - len(left)
    assert [closing.at(int(p)) for p in left] == list(range(len(left)))


def test_pads_lie_in_no_span_and_do_not_move():
    pads = torch.tensor([-1, -1, 0, 1, 2])
    assert within(pads, [Span(0, 2)]).tolist() == [False, False, True, True, False]
    assert PositionMap((Span(0, 2),)).moved(pads).tolist()[:2] == [-1, -1]


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        (Span(0, 3), Span(0, 3)),
        (Span(12, 14), Span(8, 10)),
        (Span(4, 9), Span(4, 5)),
        (Span(5, 9), None),
        (Span(7, 22), Span(5, 18)),
        (Span(20, 25), Span(16, 19)),
    ],
)
def test_a_span_keeps_what_is_left_of_it(span, expected):
    assert PositionMap((Span(5, 9), Span(22, 24)))(span) == expected


def test_several_spans_keep_those_of_which_something_is_left():
    assert PositionMap((Span(5, 9),)).over((Span(1, 2), Span(6, 8), Span(9, 11))) == (Span(1, 2), Span(5, 7))
