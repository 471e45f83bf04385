"""Whole numbers in proportion: worked out by hand, and what must hold for any."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vestige.policies.selection import apportion

QUICK = settings(deadline=None, derandomize=True, max_examples=30)


def shared(wanted, least, most, total, batch=None) -> list[int]:
    """Apportion one total, or one for each batch row."""
    rows, totals = batch or [0] * len(wanted), total if isinstance(total, list) else [total]
    columns = [torch.tensor(x) for x in (least, most, rows, totals)]
    return apportion(torch.tensor(wanted, dtype=torch.float32), *columns).tolist()


NUMBERS = [
    # What nobody stops is in proportion, and remainders go to the largest: 10 x 1/6, 2/6, 3/6.
    (([1.0, 2.0, 3.0], [0] * 3, [99] * 3, 10), [2, 3, 5]),
    # Of equal remainders the first row's counts.
    (([1.0, 1.0, 1.0], [0] * 3, [99] * 3, 10), [4, 3, 3]),
    # What the last row cannot take goes to the others, 1 to 2; what the first must keep, the others give, 2 to 3.
    (([1.0, 2.0, 3.0], [0] * 3, [99, 99, 1], 10), [3, 6, 1]),
    (([1.0, 2.0, 3.0], [5, 0, 0], [99] * 3, 10), [5, 2, 3]),
    # A total out of reach: all must keep more, or have less.
    (([1.0, 2.0], [4, 7], [99] * 2, 10), [4, 7]),
    (([1.0, 2.0], [0, 0], [3, 4], 10), [3, 4]),
    # Rows that want nothing share what the others cannot take; an empty row gets nothing.
    (([0.0, 5.0, 0.0], [0] * 3, [99, 4, 0], 10), [6, 4, 0]),
    # Batch rows have totals of their own.
    (([1.0, 3.0, 1.0, 1.0], [0] * 4, [99] * 4, [8, 4], [0, 0, 1, 1]), [2, 6, 2, 2]),
    (([1.0, 1.0, 3.0, 1.0], [0] * 4, [99] * 4, [8, 4], [0, 1, 0, 1]), [2, 2, 6, 2]),
    # Room without end.
    (([1.0, 2.0], [0, 0], [30, 40], 2**41), [30, 40]),
]


@pytest.mark.parametrize(("asked", "expected"), NUMBERS)
def test_room_is_apportioned_as_worked_out_by_hand(asked, expected):
    assert shared(*asked) == expected


ROOM_ROWS = st.lists(
    st.tuples(st.floats(0, 1e6, width=32), st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=4
)


@QUICK
@given(ROOM_ROWS, ROOM_ROWS, st.tuples(st.integers(0, 120), st.integers(0, 120)))
def test_apportioned_rooms_add_up_within_their_bounds_and_follow_what_was_wanted(one, other, totals):
    wanted, least, more = (list(column) for column in zip(*one, *other, strict=True))
    most = [low + extra for low, extra in zip(least, more, strict=True)]
    counts = shared(wanted, least, most, list(totals), [0] * len(one) + [1] * len(other))
    for total, mine in zip(totals, (range(len(one)), range(len(one), len(counts))), strict=True):
        low, high = sum(least[i] for i in mine), sum(most[i] for i in mine)
        assert sum(counts[i] for i in mine) == min(max(total, low), high)
        assert all(least[i] <= counts[i] <= most[i] for i in mine)
        free = [i for i in mine if least[i] < counts[i] < most[i]]
        assert all(counts[i] <= counts[j] + 1 for i in free for j in free if wanted[i] <= wanted[j])
