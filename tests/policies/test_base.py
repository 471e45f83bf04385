"""How policies are named, made and refused."""

import dataclasses
import inspect
import math
import pkgutil
from typing import ClassVar

import pytest
from torch import Tensor

from tests.conftest import ROOMY, made
from vestige import Budget, BudgetError, Observation, Policy, PolicyError, policies
from vestige.policies import POLICIES

NAMES = sorted(POLICIES)


# Names.


def test_every_file_of_the_folder_is_in_the_dict_once():
    files = {module.name for module in pkgutil.iter_modules(policies.__path__) if not module.name.startswith("_")}
    assert {path.partition(":")[0].rpartition(".")[2] for path in POLICIES.values()} == files - {
        "kvpress",  # an adapter
        "base",
        "observation",
        "selection",
    }
    assert len(set(POLICIES.values())) == len(POLICIES)


def test_all_lists_every_public_name_and_each_can_be_had():
    classes = {policies.resolve(name).__name__ for name in NAMES}
    assert set(policies.__all__) == {"POLICIES", "FromKVPress", "from_kvpress", "make", "name_of", "resolve"} | classes
    assert all(hasattr(policies, name) for name in policies.__all__)
    with pytest.raises(AttributeError, match="SnapVK"):
        _ = policies.SnapVK


@pytest.mark.parametrize("name", NAMES)
def test_a_name_resolves_to_a_finished_policy_that_make_builds_with_its_defaults(name):
    cls = policies.resolve(name)
    assert issubclass(cls, Policy)
    assert not inspect.isabstract(cls)
    assert getattr(policies, cls.__name__) is cls
    assert policies.make(name, None if name == "full" else ROOMY) == made(name)


def test_an_unknown_name_is_refused_with_the_nearest_and_all_valid_ones():
    for find in (policies.resolve, policies.make):
        with pytest.raises(PolicyError) as refusal:
            find("snapvk")
        message = str(refusal.value)
        assert "'snapvk'; did you mean 'snapkv'?" in message
        assert all(name in message for name in NAMES)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"full"}))
def test_a_policy_that_evicts_needs_a_budget(name):
    with pytest.raises(PolicyError, match=f"{name}.*budget.*512.*0.1.*64MB"):
        policies.make(name)


def test_full_takes_no_budget():
    assert policies.make("full").budget is None
    with pytest.raises(PolicyError, match="full.*no budget"):
        policies.make("full", ROOMY)


def test_make_hands_on_share_and_seed():
    assert policies.make("snapkv", ROOMY, share="layer").share == "layer"
    assert policies.make("random", ROOMY, seed=5) == made("random", seed=5)
    assert policies.make("snapkv", ROOMY, seed=5) == made("snapkv"), "a policy that does not draw has no seed"


# Fields.


@pytest.mark.parametrize(
    ("field", "value"),
    [("sink", -1), ("window", -1), ("every", 0), ("every", -3), ("floor", -0.1), ("floor", 1.1), ("floor", math.nan)],
)
def test_a_field_out_of_range_is_refused_by_name_and_value(field, value):
    with pytest.raises(PolicyError) as refusal:
        made("streaming_llm", **{field: value})
    assert field in str(refusal.value)
    assert repr(value) in str(refusal.value)


@pytest.mark.parametrize(("field", "value"), [("sink", 1.5), ("window", "32"), ("every", None)])
def test_a_count_that_is_no_integer_is_refused(unchecked, field, value):
    with pytest.raises(PolicyError, match=f"{field}.*integer"):
        made("streaming_llm", **{field: value})


def test_an_unknown_share_is_refused_with_the_nearest_and_all_valid_ones(unchecked):
    for build in (made, policies.make):
        with pytest.raises(PolicyError, match="'modle'; did you mean 'model'. available: head, layer, model"):
            build("snapkv", **({"budget": ROOMY} if build is policies.make else {}), share="modle")


@pytest.mark.parametrize("options", [{"observed": 0}, {"observed": -2}, {"kernel": 0}, {"kernel": 4}, {"kernel": -1}])
def test_snapkv_refuses_no_queries_and_kernels_without_a_middle(options):
    with pytest.raises(PolicyError, match="observed"):
        made("snapkv", **options)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"full"}))
def test_a_budget_below_sink_and_window_is_refused_at_once_with_both_numbers(name):
    with pytest.raises(BudgetError, match="35.*36"):
        policies.resolve(name)(budget=Budget.tokens(35), sink=4, window=32)
    assert policies.resolve(name)(budget=Budget.tokens(36), sink=4, window=32).protected == 36


def test_a_need_that_the_cache_does_not_know_is_refused():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wishful(Policy):
        needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

        def score(self, seen: Observation) -> Tensor:
            raise NotImplementedError

    with pytest.raises(PolicyError, match="hidden.*queries"):
        Wishful(budget=ROOMY)


def test_a_policy_tells_how_many_queries_it_looks_at():
    assert made("snapkv").ring_sizes == {"queries": 32}
    assert made("snapkv", observed=7).ring_sizes == {"queries": 7}
    assert made("tova").ring_sizes == {"queries": 1}
    assert made("knorm").ring_sizes == {}


def test_a_policy_without_a_score_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Policy(budget=ROOMY)
