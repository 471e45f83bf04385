"""Packed rows, their layouts, and the gathers between them; every property holds for empty rows and for no rows."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vestige.kernels import packed

QUICK = settings(deadline=None, derandomize=True, max_examples=30)
LENGTHS = st.lists(st.integers(0, 5), max_size=6)


@st.composite
def layouts(draw, lengths=LENGTHS) -> tuple[list[int], list[int], list[int]]:
    """Return starts, lengths and capacities of rows with slack behind them."""
    lengths = draw(lengths)
    capacities = [n + draw(st.integers(0, 3)) for n in lengths]
    return [sum(capacities[:row]) for row in range(len(capacities))], lengths, capacities


def slots_of(starts: list[int], lengths: list[int]) -> list[int]:
    return [start + i for start, n in zip(starts, lengths, strict=True) for i in range(n)]


@QUICK
@given(LENGTHS)
def test_cumulative_says_where_rows_begin_and_the_total_last(lengths):
    ends = packed.cumulative(lengths)
    assert ends == [sum(lengths[:row]) for row in range(len(lengths) + 1)]


@QUICK
@given(LENGTHS)
def test_row_ids_name_the_row_of_each_packed_pair(lengths):
    rows = packed.row_ids(lengths)
    assert rows.dtype == torch.long
    assert rows.tolist() == [row for row, n in enumerate(lengths) for _ in range(n)]


@QUICK
@given(layouts())
def test_packed_slots_walk_each_row_from_its_start(layout):
    starts, lengths, _ = layout
    assert packed.packed_slots(starts, lengths).tolist() == slots_of(starts, lengths)


@QUICK
@given(layouts(), st.randoms(use_true_random=False))
def test_packed_slots_follow_rows_in_any_order(layout, random):
    rows = list(zip(*layout[:2], strict=True))
    random.shuffle(rows)
    rows += rows[:1]  # a row may be taken twice, as beam search does
    starts, lengths = [start for start, _ in rows], [n for _, n in rows]
    assert packed.packed_slots(starts, lengths).tolist() == slots_of(starts, lengths)


@QUICK
@given(LENGTHS, st.data())
def test_counts_per_row_count_the_marked_pairs(lengths, data):
    marks = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    flat = torch.tensor([mark for row in marks for mark in row], dtype=torch.bool)
    assert packed.counts_per_row(flat, lengths) == [sum(row) for row in marks]


@QUICK
@given(layouts())
def test_layout_index_puts_sources_in_rows_and_points_slack_at_slot_0(layout):
    starts, lengths, capacities = layout
    source = torch.arange(sum(lengths)) + 100
    expected = [0] * sum(capacities)
    for slot, value in zip(slots_of(starts, lengths), source.tolist(), strict=True):
        expected[slot] = value
    assert packed.layout_index(source, lengths, capacities).tolist() == expected


@QUICK
@given(layouts(), st.data())
def test_a_new_layout_holds_the_chosen_pairs_of_each_row_in_order(layout, data):
    starts, lengths, capacities = layout
    column = torch.arange(sum(capacities))
    owned = [slots_of([start], [n]) for start, n in zip(starts, lengths, strict=True)]
    kept = [[slot for slot in slots if data.draw(st.booleans())] for slots in owned]
    counts = [len(row) for row in kept]
    room = [n + data.draw(st.integers(0, 3)) for n in counts]
    source = torch.tensor([slot for row in kept for slot in row], dtype=torch.long)
    moved = packed.gather(column, packed.layout_index(source, counts, room))
    assert len(moved) == sum(room)
    begins = packed.cumulative(room)
    assert [moved[begin : begin + n].tolist() for begin, n in zip(begins, counts, strict=False)] == kept


@QUICK
@given(layouts())
def test_gathering_packed_slots_takes_the_slack_out(layout):
    starts, lengths, capacities = layout
    column = torch.full((sum(capacities), 2), float("nan"))
    slots = packed.packed_slots(starts, lengths)
    column[slots] = torch.arange(2.0 * len(slots)).view(-1, 2)
    assert torch.equal(packed.gather(column, slots), torch.arange(2.0 * len(slots)).view(-1, 2))


def test_gather_keeps_the_rest_of_the_shape_and_the_dtype():
    column = torch.arange(24, dtype=torch.int32).view(4, 2, 3)
    chosen = packed.gather(column, torch.tensor([3, 0, 3]))
    assert chosen.dtype == torch.int32
    assert torch.equal(chosen, torch.stack([column[3], column[0], column[3]]))


def test_an_empty_column_gathers_into_an_empty_buffer_of_that_size():
    buffer = packed.gather(torch.empty(0, 3, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.long))
    assert (buffer.shape, buffer.dtype) == ((5, 3), torch.bfloat16)
    assert packed.gather(torch.empty(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0, 3)


@QUICK
@given(st.permutations(range(6)), st.integers(0, 6))
def test_append_writes_the_given_slots_in_place_and_no_other(order, count):
    column = torch.full((6, 2), -1.0)
    slots, new = torch.tensor(order[:count], dtype=torch.long), torch.arange(2.0 * count).view(count, 2)
    assert packed.append(column, slots, new) is column
    expected = [[-1.0, -1.0]] * 6
    for i, slot in enumerate(order[:count]):
        expected[slot] = [2.0 * i, 2.0 * i + 1]
    assert column.tolist() == expected


def test_append_under_autograd_copies_and_lets_gradients_through():
    column, new = torch.zeros(4, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    with torch.enable_grad():
        grown = packed.append(column, torch.tensor([1, 3]), new)
        (grown * torch.arange(8.0).view(4, 2)).sum().backward()
    assert torch.equal(column, torch.zeros(4, 2)), "the old column is still needed by whoever attended to it"
    assert grown.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]
    assert new.grad.tolist() == [[2, 3], [6, 7]]
    assert column.grad.tolist() == [[0, 1], [0, 0], [4, 5], [0, 0]]


def test_append_copies_where_only_the_old_pairs_have_gradients():
    with torch.enable_grad():
        column = torch.zeros(3, 1, requires_grad=True) * 2
        grown = packed.append(column, torch.tensor([2]), torch.ones(1, 1))
    assert grown is not column
    assert not column.any()


def test_append_is_in_place_where_gradients_are_switched_off():
    column, new = torch.zeros(3, 1), torch.ones(1, 1, requires_grad=True)
    with torch.no_grad():
        assert packed.append(column, torch.tensor([0]), new) is column
    assert column.tolist() == [[1], [0], [0]]


def test_append_is_in_place_with_gradients_on_where_nothing_needs_them():
    column = torch.zeros(3, 1)
    with torch.enable_grad():
        assert packed.append(column, torch.tensor([1]), torch.ones(1, 1)) is column
    assert column.tolist() == [[0], [1], [0]]
