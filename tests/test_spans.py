"""Half-open ranges of positions."""

import dataclasses

import pytest

from vestige import InputError, Span


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
