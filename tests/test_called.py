"""Names with options are read, never run, and checked against the class they name."""

import pytest

from vestige import Budget, PolicyError, called, policies

BUDGET = Budget.tokens(50)


def test_a_list_is_split_at_commas_outside_parentheses():
    assert called.split("snapkv(kernel=7, observed=16), full,,tova") == [
        "snapkv(kernel=7, observed=16)",
        "full",
        "tova",
    ]
    assert called.split("") == []


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
    assert called.parse(text, "policy", PolicyError) == expected


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
        called.parse(text, "policy", PolicyError)


def test_options_in_a_name_make_the_policy():
    made = policies.make("snapkv(kernel=7, share=layer)", BUDGET)
    assert made == policies.SnapKV(budget=BUDGET, kernel=7, share="layer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapkv(kernels=7)", "policy 'snapkv' has no option 'kernels'; available: causal, every, first_share"),
        ("snapkv(budget=7)", "has no option 'budget'"),
        ("snapkv(kernel=7.0)", "policy 'snapkv': kernel is of the kind of 5, got 7.0"),
        ("snapkv(kernel=True)", "kernel is of the kind of 5, got True"),
        ("snapkv(kernel=4)", "kernel odd"),
        ("snapkv(share=all)", "unknown share 'all'"),
        ("snap(kernel=3)", "unknown policy 'snap'"),
    ],
)
def test_a_wrong_option_is_named(text, message):
    with pytest.raises(PolicyError) as error:
        policies.make(text, BUDGET)
    assert message in str(error.value)


def test_a_whole_number_does_for_a_fraction_and_a_threshold_for_a_budget():
    assert policies.make("snapkv(floor=1)", BUDGET).floor == 1
    made = policies.make("knorm(threshold=-1.5)")
    assert made.budget is None and made.evicts
