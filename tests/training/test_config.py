"""Options of a run, its learning rates, and the order of samples."""

import math

import pytest
import torch

from vestige import InputError
from vestige.training.config import LoopConfig
from vestige.training.sampler import derive_seed, find_sample_index, make_generator


def rates(**options) -> list[float]:
    config = LoopConfig(lr=2.0, **options)
    return [config.lr_at(step) for step in range(config.steps)]


def test_a_warm_up_rises_in_equal_parts_and_half_a_cosine_follows():
    assert rates(steps=8, warmup=4) == pytest.approx(
        [0.5, 1.0, 1.5, 2.0, 2.0, 1 + math.cos(math.pi / 4), 1.0, 1 - math.cos(math.pi / 4)]
    )


def test_a_schedule_comes_down_to_its_final_share():
    falling = rates(steps=1000, final=0.1)
    assert falling[0] == 2.0 and falling[-1] == pytest.approx(0.2, abs=1e-4)
    assert falling == sorted(falling, reverse=True) and min(falling) > 0.2
    assert rates(steps=10, schedule="wsd", decay=0.5, final=0.5)[-1] == pytest.approx(1 + 1 / 6)


def test_wsd_is_stable_and_then_falls_in_a_line():
    assert rates(steps=10, warmup=2, schedule="wsd", decay=0.3) == pytest.approx(
        [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    )
    assert rates(steps=3, schedule="wsd", decay=0.0) == [2.0] * 3


def test_constant_stays_and_a_warm_up_may_be_all_there_is():
    assert rates(steps=3, schedule="constant") == [2.0] * 3
    assert rates(steps=2, warmup=2) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"batch": True}, "batch must be a whole number of at least 1, got True"),
        ({"save_every": -1}, "save_every must be .* at least 1, got -1"),
        ({"validate_every": 0}, "validate_every must be .* at least 1, got 0"),
        ({"warmup": 11}, "warmup must not exceed steps, got 11 and 10"),
        ({"warmup": -1}, "warmup must be a whole number of at least 0, got -1"),
        ({"lr": 0.0}, "lr must be a number above 0, got 0.0"),
        ({"lr": math.nan}, "lr must be a number above 0, got nan"),
        ({"clip": -1.0}, "clip must be a number above 0, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"decay": 1.5}, r"decay must lie in \[0, 1\], got 1.5"),
        ({"final": -0.5}, r"final must lie in \[0, 1\], got -0.5"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_an_option_out_of_range_is_refused_with_what_came(options, words):
    with pytest.raises(InputError, match=words):
        LoopConfig(**({"steps": 10} | options))


def test_an_unknown_schedule_is_refused_by_name():
    message = "unknown schedule 'cosin'; did you mean 'cosine'? available: cosine, wsd, constant"
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        LoopConfig(steps=10, schedule="cosin")


def test_the_last_step_validates_and_saves_whatever_the_intervals():
    config = LoopConfig(steps=10, save_every=4, validate_every=3)
    assert [n for n in range(1, 11) if config.saves(n)] == [4, 8, 10]
    assert [n for n in range(1, 11) if config.validates(n)] == [3, 6, 9, 10]
    assert [n for n in range(1, 11) if LoopConfig(steps=10).validates(n)] == [10]


def test_a_sample_follows_from_seed_and_position_alone():
    order = [find_sample_index(3, position, 7) for position in range(21)]
    for position in reversed(range(21)):
        assert find_sample_index(3, position, 7) == order[position]
    assert all(sorted(order[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert order != [find_sample_index(4, position, 7) for position in range(21)]
    assert order[:3] == [0, 1, 5], "a change of the order breaks every checkpoint there is"


def test_seeds_differ_by_what_they_are_for_and_fit_torch():
    seeds = [derive_seed(0, "sample", n) for n in range(500)] + [
        derive_seed(0, "samples", 1),
        derive_seed(1, "sample", 0),
    ]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    first, again = (torch.rand(3, generator=make_generator(1, "x")) for _ in range(2))
    assert first.equal(again) and not first.equal(torch.rand(3, generator=make_generator(2, "x")))
