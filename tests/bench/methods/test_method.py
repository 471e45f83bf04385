"""What is compared: every combination once, and what cannot be named is refused before anything is loaded."""

import pytest

from vestige import BudgetError, InputError, PolicyError, policies
from vestige.bench.methods.method import Method, cross
from vestige.policies import POLICIES

PRESS, DYNAMIC = "kvpress:SnapKVPress", "transformers:dynamic"


def told(arms) -> list[tuple[str, str, str | None, str | None]]:
    return [(arm.policy, arm.budget, arm.share, arm.peer) for arm in arms]


def test_every_combination_of_policy_share_and_budget():
    arms = cross(("snapkv", "keydiff"), ("0.5", "64"), shares=("head", "model"))
    assert told(arms) == [
        (name, budget, share, None)
        for name in ("snapkv", "keydiff") for share in ("head", "model") for budget in ("0.5", "64")
    ]  # fmt: skip
    assert {arm.memory for arm in arms} == {"none"}


def test_full_is_one_arm_however_many_budgets_and_shares():
    arms = cross(("full", "random"), ("0.5", "0.25"), shares=("head", "model"))
    assert [arm.budget for arm in arms if arm.policy == "full"] == ["1.0"]
    assert len(arms) == 5
    assert cross(("full",), ())[0].make_policy(0) == policies.Full()


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"full"}))
def test_without_a_share_a_method_has_its_own(name):
    (arm,) = cross((name,), ("64",))
    assert arm.share == policies.make(name, arm.make_policy(0).budget).share


def test_what_is_named_twice_is_one_arm():
    assert len(cross(("full", "full", "snapkv", "snapkv"), ("0.5", "0.5"), peers=(DYNAMIC, DYNAMIC))) == 3


def test_peers_take_budgets_if_they_evict():
    assert told(cross((), ("0.5", "64"), peers=(PRESS, DYNAMIC))) == [
        (PRESS, "0.5", None, PRESS), (PRESS, "64", None, PRESS), (DYNAMIC, "1.0", None, DYNAMIC),
    ]  # fmt: skip
    assert told(cross(("full",), (), peers=(DYNAMIC,)))[1:] == [(DYNAMIC, "1.0", None, DYNAMIC)]


def test_a_policy_gets_its_budget_share_and_seed():
    made = Method(policy="random", budget="64", share="layer").make_policy(seed=7)
    assert made == policies.make("random", made.budget, share="layer", seed=7)
    assert made.budget.amount == 64 and made.seed == 7


def test_names_and_keys():
    arm = Method(policy="snapkv", budget="0.10", share="model")
    assert arm.name == "snapkv:model@0.10"
    assert arm.key == {"policy": "snapkv", "share": "model", "memory": "none", "budget": "0.10", "peer": None}
    assert Method(policy=PRESS, budget="64", peer=PRESS).name == f"{PRESS}@64"
    assert Method(policy="snapkv", budget="64", samples=3).key == Method(policy="snapkv", budget="64").key


@pytest.mark.parametrize(
    ("names", "budgets", "options", "kind", "message"),
    [
        ((), ("0.5",), {}, InputError, "name at least one --policy or --peer"),
        (("snapvk",), ("0.5",), {}, PolicyError, "unknown policy 'snapvk'; did you mean 'snapkv'"),
        (("full", "snapkv"), (), {}, PolicyError, "policy 'snapkv' needs a budget: tokens"),
        (("snapkv",), ("0.5", "many"), {}, BudgetError, "cannot read budget 'many'"),
        (("snapkv",), ("20",), {}, BudgetError, "20 pairs a row.* protect 36"),
        (("snapkv",), ("1.5",), {}, BudgetError, "fraction must lie in"),
        (("snapkv",), ("64",), {"shares": ("heads",)}, PolicyError, "unknown share 'heads'; did you mean 'head'"),
        (("snapkv",), ("64",), {"memories": ("moment",)}, PolicyError, "unknown memory 'moment'.*available: none"),
        ((), ("64",), {"peers": ("kvpres:SnapKVPress",)}, InputError, "unknown peer 'kvpres:SnapKVPress'"),
        ((), ("64",), {"peers": ("transformers:static",)}, InputError, "unknown peer"),
        ((), (), {"peers": (PRESS,)}, InputError, f"peer {PRESS} needs --budget"),
        ((), ("some",), {"peers": (PRESS,)}, BudgetError, "cannot read budget 'some'"),
        # What full and peers do not use is checked all the same: a typing error is not a setting.
        (("full",), (), {"memories": ("moment",)}, PolicyError, "unknown memory 'moment'"),
        (("full",), (), {"shares": ("heads",)}, PolicyError, "unknown share 'heads'"),
        (("full",), ("many",), {}, BudgetError, "cannot read budget 'many'"),
        ((), (), {"peers": (DYNAMIC,), "memories": ("moment",)}, PolicyError, "unknown memory 'moment'"),
    ],
)
def test_what_cannot_be_an_arm_is_refused(names, budgets, options, kind, message):
    with pytest.raises(kind, match=message):
        cross(names, budgets, **options)


def test_an_arm_made_by_hand_is_checked_too():
    with pytest.raises(PolicyError, match="unknown policy"):
        Method(policy="snapvk", budget="64")
    with pytest.raises(PolicyError, match="unknown memory"):
        Method(policy="full", memory="moment")
    with pytest.raises(InputError, match="unknown peer"):
        Method(policy="x", budget="64", peer="x")
    with pytest.raises(BudgetError, match="cannot read budget"):
        Method(policy=PRESS, budget="much", peer=PRESS)
