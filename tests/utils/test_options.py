"""Names with options are read, never run, and checked against the class they name."""

import pytest

from vestige import Budget, PolicyError, policies
from vestige.utils import options

BUDGET = Budget.tokens(50)


def test_a_list_is_split_at_commas_outside_parentheses():
    assert options.split("snapkv(kernel=7, observed=16), full,,tova") == [
        "snapkv(kernel=7, observed=16)",
        "full",
        "tova",
    ]
    assert options.split("") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("snapkv", ("snapkv", {})),
        (" snapkv ", ("snapkv", {})),
        ("snapkv()", ("snapkv", {})),
        ("laprox(scale=calibrated, sink=4)", ("laprox", {"scale": "calibrated", "sink": 4})),
        ("learned(adapter=made/adapter-2, b=None)", ("learned", {"adapter": "made/adapter-2", "b": None})),
        ("retention(gates='a, (b)/c', d=who/ever)", ("retention", {"gates": "a, (b)/c", "d": "who/ever"})),
        ("x(a='b', c=-1.5, d=(1, 2), e=True)", ("x", {"a": "b", "c": -1.5, "d": (1, 2), "e": True})),
    ],
)
def test_a_name_is_taken_apart(text, expected):
    assert options.parse_options(text, "policy", PolicyError) == expected


@pytest.mark.parametrize(
    "text",
    [
        "snapkv(",
        "snapkv(7)",
        "snapkv(kernel=f())",
        "a.b(c=1)",
        "x(a=1)(b=2)",
        "(a=1)",
        "snapkv(**{})",
        "x(a=1, a=2)",
        "x(a=1",
        "x(a='b)",
        "x(=1)",
        "x(a=b c)",
    ],
)
def test_what_cannot_be_read_is_an_error_that_shows_how(text):
    with pytest.raises(PolicyError, match=r"cannot read policy .*: write it like .*\(option=value\)"):
        options.parse_options(text, "policy", PolicyError)


def test_options_in_a_name_make_the_policy():
    made = policies.make("snapkv(kernel=7, share=layer)", BUDGET)
    assert made == policies.SnapKV(budget=BUDGET, kernel=7, share="layer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapkv(kernels=7)", "policy 'snapkv' has no option 'kernels'; available: causal, every, first_share"),
        ("snapkv(budget=7)", "has no option 'budget'"),
        ("snapkv(kernel=7.0)", "policy 'snapkv': kernel takes a whole number, got 7.0"),
        ("snapkv(kernel=True)", "kernel takes a whole number, got True"),
        ("snapkv(causal=1)", "causal takes True or False, got 1"),
        ("knorm(threshold=abc)", "threshold takes a number or None, got 'abc'"),
        ("xkv(profile=5)", "profile takes several in brackets, each a number or None, got 5"),
        ("xkv(profile=[1, x])", "write it like xkv(option=value)"),
        ("kvzip(request=[1, 0.5])", "request takes several in brackets, each a whole number or None, got (1, 0.5)"),
        ("retention(gates=5)", "gates takes text or None, got 5"),
        ("snapkv(kernel=4)", "kernel odd"),
        ("snapkv(share=all)", "unknown share 'all'"),
        ("snap(kernel=3)", "unknown policy 'snap'"),
    ],
)
def test_a_wrong_option_is_named(text, message):
    with pytest.raises(PolicyError) as error:
        policies.make(text, BUDGET)
    assert message in str(error.value)


def test_true_may_be_written_small_and_several_in_either_brackets():
    assert policies.make("snapkv(causal=true)", BUDGET).causal is True
    assert policies.make("xkv(profile=[1, 2.5])", BUDGET).profile == (1, 2.5)
    assert policies.make("knorm(threshold=none)", BUDGET).threshold is None


def test_a_whole_number_does_for_a_fraction_and_a_threshold_for_a_budget():
    assert policies.make("snapkv(floor=1)", BUDGET).floor == 1
    made = policies.make("knorm(threshold=-1.5)")
    assert made.budget is None and made.evicts
