"""Budgets: what people write, what they get in pairs, and what is refused."""

import dataclasses
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vestige import Budget, BudgetError
from vestige.budget import Footprint

EXACT = settings(deadline=None, derandomize=True, max_examples=60)
ONE = Footprint(rows=2, pair_bytes=520)

FRACTIONS = st.floats(0, 1, exclude_min=True, allow_subnormal=False)
KINDS = (
    st.integers(1, 10**9).map(Budget.tokens),
    FRACTIONS.map(Budget.fraction),
    st.integers(1, 10**15).map(lambda n: Budget.bytes(float(n))),
)


def pairs(budget: Budget, *, seen: int = 0, length: int | None = None, protected: int = 0, footprint=ONE) -> int:
    return budget.pairs(seen=seen, length=length, protected=protected, footprint=footprint)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", Budget.tokens(512)),
        (" 512 ", Budget.tokens(512)),
        ("1", Budget.tokens(1)),
        ("0.1", Budget.fraction(0.1)),
        (".5", Budget.fraction(0.5)),
        ("1.0", Budget.fraction(1.0)),
        ("64MB", Budget.bytes(64e6)),
        ("12.5MB", Budget.bytes(12.5e6)),
        ("64 MB", Budget.bytes(64e6)),
        ("3KB", Budget.bytes(3e3)),
        ("2GB", Budget.bytes(2e9)),
        ("1KiB", Budget.bytes(1024.0)),
        ("64MiB", Budget.bytes(64.0 * 2**20)),
        ("1.5GiB", Budget.bytes(1.5 * 2**30)),
        ("4096B", Budget.bytes(4096.0)),
    ],
)
def test_parse_reads_tokens_fractions_and_bytes(text, expected):
    assert Budget.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", " ", "abc", "MB", "B", "5.MBx", "0.1.2", "1e3", "nan", "inf", "12 34", "64mb", "--5"]
)
def test_parse_says_what_it_could_not_read_and_what_may_be_written(text):
    with pytest.raises(BudgetError) as refusal:
        Budget.parse(text)
    message = str(refusal.value)
    assert repr(text) in message
    assert all(form in message for form in ("512", "0.1", "64MB"))


@pytest.mark.parametrize("text", ["-5", "0", "1.5", "0.0", "-0.1", "0MB", "-1KB", "1" + "0" * 400 + "B", "1.0e400"])
def test_parse_refuses_what_is_out_of_range(text):
    with pytest.raises(BudgetError):
        Budget.parse(text)


def test_a_fraction_above_1_is_refused_with_a_hint_at_tokens():
    with pytest.raises(BudgetError, match="tokens"):
        Budget.parse("512.0")


@EXACT
@example("1" + "0" * 400)
@given(st.text("0123456789.-+eE_ KMGiB", max_size=12))
def test_parse_gives_a_budget_or_a_budget_error_and_nothing_else(text):
    try:
        budget = Budget.parse(text)
    except BudgetError:
        return
    assert budget.amount > 0


@EXACT
@example(Budget.fraction(1.0))
@example(Budget.fraction(1e-5))
@example(Budget.tokens(1))
@given(st.one_of(KINDS))
def test_what_a_budget_prints_parses_back_to_it(budget):
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("amount", [0, -1, 0.0, -0.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["tokens", "fraction", "bytes"])
def test_a_budget_is_a_positive_number(kind, amount):
    with pytest.raises(BudgetError, match="positive"):
        Budget(kind, float(amount))


def test_tokens_are_whole_numbers():
    with pytest.raises(BudgetError, match="whole"):
        Budget("tokens", 1.5)


def test_a_budget_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget.tokens(5).amount = 6.0


def test_tokens_are_the_pairs_whatever_was_seen():
    assert pairs(Budget.tokens(7), seen=3, length=1000, protected=36) == 7


@pytest.mark.parametrize(
    ("fraction", "length", "expected"),
    [
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.1, 2048, 204),
        (0.3, 10, 3),
        (1.0, 12345, 12345),
        (0.999, 10, 9),
        (0.01, 99, 0),
    ],
)
def test_a_fraction_rounds_down_but_not_below_what_a_person_computes(fraction, length, expected):
    assert pairs(Budget.fraction(fraction), seen=5, length=length) == expected


@EXACT
@given(st.integers(1, 100), st.integers(0, 10**6))
def test_percentages_of_any_length_are_those_of_integer_arithmetic(percent, length):
    assert pairs(Budget.fraction(percent / 100), length=length) == percent * length // 100
    assert Budget.share_of(length, percent / 100) == percent * length // 100


def test_a_fraction_of_an_unannounced_length_is_of_the_tokens_seen_and_never_below_the_protected():
    assert pairs(Budget.fraction(0.25), seen=1000, protected=36) == 250
    assert pairs(Budget.fraction(0.25), seen=100, protected=36) == 36


def test_a_fraction_of_an_announced_length_does_not_grow_with_the_tokens_seen():
    assert pairs(Budget.fraction(0.25), seen=9999, length=400, protected=36) == 100


def test_bytes_become_the_pairs_that_fit_beside_what_is_fixed():
    footprint = Footprint(rows=2, pair_bytes=520, fixed_bytes=1000)
    assert pairs(Budget.bytes(1000.0 + 3 * 520), footprint=footprint) == 3
    assert pairs(Budget.bytes(999.0 + 3 * 520), footprint=footprint) == 2
    assert pairs(Budget.bytes(10.0), footprint=footprint) == 0


@EXACT
@given(st.integers(1, 10**10), st.integers(1, 10**5), st.integers(0, 10**9))
def test_the_pairs_of_a_byte_budget_fit_and_one_more_would_not(given_bytes, pair_bytes, fixed_bytes):
    n = pairs(Budget.bytes(float(given_bytes)), footprint=Footprint(1, pair_bytes, fixed_bytes))
    assert n >= 0
    assert n == 0 or fixed_bytes + n * pair_bytes <= given_bytes
    assert fixed_bytes + (n + 1) * pair_bytes > given_bytes


@EXACT
@given(
    st.one_of(st.tuples(kind, kind) for kind in KINDS),
    st.integers(0, 10**5),
    st.none() | st.integers(0, 10**5),
    st.integers(0, 100),
)
def test_a_larger_budget_never_gives_fewer_pairs(budgets, seen, length, protected):
    less, more = sorted(budgets, key=lambda budget: budget.amount)
    few = pairs(less, seen=seen, length=length, protected=protected)
    assert 0 <= few <= pairs(more, seen=seen, length=length, protected=protected)


@EXACT
@given(FRACTIONS, st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_fraction_never_gives_more_than_there_is_beside_the_protected(fraction, seen, protected):
    assert pairs(Budget.fraction(fraction), seen=seen, protected=protected) <= max(seen, protected)
    assert pairs(Budget.fraction(fraction), length=seen, protected=protected) <= seen


@pytest.mark.parametrize(
    ("budget", "known", "gives", "protected"),
    [
        (Budget.tokens(35), {}, 35, 36),
        (Budget.tokens(35), {"length": 10}, 35, 36),
        (Budget.fraction(0.1), {"length": 300}, 30, 36),
        (Budget.bytes(520.0 * 20), {"footprint": ONE}, 20, 36),
        (Budget.bytes(1.0), {"footprint": ONE}, 0, 36),
    ],
)
def test_a_budget_below_the_protected_pairs_is_refused_with_both_numbers(budget, known, gives, protected):
    with pytest.raises(BudgetError) as refusal:
        budget.check(protected, **known)
    assert {str(gives), str(protected), str(budget)} <= set(str(refusal.value).replace(",", " ").split())


@pytest.mark.parametrize(
    ("budget", "known"),
    [
        (Budget.tokens(36), {}),
        (Budget.fraction(0.12), {"length": 300}),
        (Budget.fraction(0.01), {}),  # of a length not known yet
        (Budget.fraction(1.0), {"length": 10}),  # a text shorter than sink + window is kept whole
        (Budget.bytes(520.0 * 36), {"footprint": ONE}),
        (Budget.bytes(1.0), {"length": 300}),  # of pairs of a weight not known yet
    ],
)
def test_a_budget_that_has_room_for_the_protected_or_cannot_be_judged_yet_passes(budget, known):
    budget.check(36, **known)


def test_a_fraction_of_a_text_that_is_protected_whole_is_refused_with_the_pairs_there_are():
    with pytest.raises(BudgetError, match="5 pairs.*10"):
        Budget.fraction(0.5).check(36, length=10)


def test_reading_slack_multiplies_the_limit_and_infinity_lifts_it():
    assert Budget.slacken(100, 1.0) == 100
    assert Budget.slacken(100, 2.0) == 200
    assert Budget.slacken(29, 1.1) == 31
    assert Budget.slacken(100, math.inf) > 10**12
    assert Budget.slacken(0, math.inf) > 10**12


@EXACT
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_a_share_of_an_average_is_monotone_and_never_more_than_the_average(average, part, other):
    less, more = sorted([part, other])
    assert 0 <= Budget.share_of(average, less) <= Budget.share_of(average, more) <= average
