"""Linear memories and slots against loops, and taking pairs out of them again."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.memory.test_base import (
    EXACTLY,
    HEAD_DIM,
    VALUE_DIM,
    ask,
    close,
    empty,
    gone,
    made,
    part,
    queries,
    random_rows,
    random_weights,
)  # fmt: skip
from vestige import InputError, PolicyError
from vestige.kernels.merge import AdditiveOutput, PartialAttention
from vestige.memory import Linear, Slots
from vestige.nn.latent_memory import Latent, LatentConfig

# Linear memories.


def naive_linear(latent: Latent, keys: Tensor, values: Tensor, at: list[int], given: Tensor) -> Tensor:
    """Return what is read of one row, pair by pair."""
    layer = latent.at(0)
    weight = layer.phi.weight.double()
    latest = max(at)
    matrix = torch.zeros(weight.shape[0], values.shape[1], dtype=torch.double)
    mass = torch.zeros(weight.shape[0], dtype=torch.double)
    for key, value, position in zip(keys.double(), values.double(), at, strict=True):
        projected = weight @ key
        left = 1.0 if layer.decay is None else float(layer.decay.double().sigmoid()) ** ((latest - position) / 128)
        matrix += left * torch.outer(projected, value)
        mass += left * projected.square()
    read = []
    for query in given.double():
        projected = weight @ query
        read.append(projected @ matrix / (projected.square() @ mass + 1e-6))
    return torch.stack(read)


def scattered(one, keys: list[Tensor], values: list[Tensor], at: list[list[int]], seed: int):
    """Return the state after the pairs came in three pieces, as decoding may evict what reading kept."""
    state, generator = empty(one, len(keys)), torch.Generator().manual_seed(seed)
    order = [torch.randperm(len(k), generator=generator) for k in keys]  # decode may evict what prefill kept
    for piece in range(3):
        chosen = [x[piece::3].sort().values for x in order]
        taken = gone(*([x[i] for x, i in zip(xs, chosen, strict=True)] for xs in (keys, values)))
        padded = torch.full_like(taken.positions, -1)
        for r, index in enumerate(chosen):
            padded[r, : len(index)] = torch.tensor(at[r])[index]
        state = one.absorb(state, dataclasses.replace(taken, positions=padded))
    return state


@pytest.mark.parametrize("name", ["linear", "linear, decays"])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_read_is_that_of_a_loop_however_the_pairs_came(name, seed):
    one, given = made(name, **EXACTLY), queries(2)
    keys, values = random_rows([60, 31], seed)
    at = [[7 * i + 3 for i in range(60)], [400 * i for i in range(31)]]
    state = scattered(one, keys, values, at, seed)
    found = ask(one, state, given)
    for r in range(2):
        expected = naive_linear(one.latent, keys[r], values[r], at[r], given[r])
        share = torch.sigmoid(one.latent.at(0).gate).item()
        torch.testing.assert_close(found.output[r].double(), share * expected, atol=1e-5, rtol=1e-4)


def test_a_gate_that_is_closed_changes_no_bit():
    one = made("linear")
    one.latent.at(0).gate.fill_(-torch.inf)
    state = one.absorb(empty(one, 1), gone(*random_rows([40])))
    found = ask(one, state, queries(1))
    kept = torch.randn(1, 5, VALUE_DIM)
    assert isinstance(found, AdditiveOutput) and torch.equal(kept + found.output, kept)


def test_a_gate_may_hang_on_the_query():
    one = Linear(latent=random_weights(asks=True), **EXACTLY)
    state = one.absorb(empty(one, 1), gone(*random_rows([40])))
    before, layer = ask(one, state, queries(1)), one.latent.at(0)
    layer.asking.copy_(torch.randn(HEAD_DIM, generator=torch.Generator().manual_seed(3)))
    opened = torch.sigmoid(layer.gate + queries(1) @ layer.asking) / torch.sigmoid(layer.gate)
    torch.testing.assert_close(ask(one, state, queries(1)).output, before.output * opened[..., None])


# Slots.


@pytest.mark.parametrize("name", ["slots", "slots, decays"])
@pytest.mark.parametrize("seed", [0, 1])
def test_slots_are_those_of_a_loop_however_the_pairs_came(name, seed):
    one, given = made(name, **EXACTLY), queries(2)
    layer = one.latent.at(0)
    layer.reading.copy_(torch.tensor([1.3, -0.5]))
    keys, values = random_rows([60, 31], seed)
    at = [[7 * i + 3 for i in range(60)], [40 * i for i in range(31)]]
    found = ask(one, scattered(one, keys, values, at, seed), given)
    for r in range(2):
        mass, means = [0.0] * 5, [[torch.zeros(HEAD_DIM), torch.zeros(VALUE_DIM)] for _ in range(5)]
        for key, value, position in zip(keys[r], values[r], at[r], strict=True):
            left = 1.0 if layer.decay is None else float(torch.sigmoid(layer.decay)) ** ((max(at[r]) - position) / 128)
            for s, share in enumerate((layer.phi(key)).softmax(0).tolist()):
                mass[s] += left * share
                means[s] = [mean + left * share * x for mean, x in zip(means[s], (key, value), strict=True)]
        slots = torch.stack([means[s][0] / mass[s] for s in range(5)])
        logits = 1.3 * 0.4 * given[r] @ slots.T + torch.tensor(mass).log()
        expected = logits.softmax(-1) @ torch.stack([means[s][1] / mass[s] for s in range(5)])
        close(part(found, r), PartialAttention(expected, logits.logsumexp(-1) - 0.5), 1e-3)


@pytest.mark.parametrize("name", ["linear", "slots"])
def test_to_absorb_and_release_is_the_identity(name):
    one, given = made(name, **EXACTLY), queries(2)
    keys, values = random_rows([50, 20])
    before = one.absorb(empty(one, 2), gone(keys, values))
    more = gone(*random_rows([9, 30], seed=4))
    after = one.release(one.absorb(before, more), more)
    assert one.releases
    for x in before:
        torch.testing.assert_close(after[x], before[x], atol=1e-4, rtol=1e-4)
    close(ask(one, after, given), ask(one, before, given), 1e-4)
    everything = one.release(before, gone(keys, values))
    for value in vars(ask(one, everything, given)).values():
        assert not value.any() or (value < -1e20).all(), "nothing is left"


@pytest.mark.parametrize("name", ["moments", "centroids", "linear, decays", "slots, decays"])
def test_what_fades_or_is_averaged_cannot_be_taken_apart(name):
    one = made(name)
    given = gone(*random_rows([5]))
    assert not one.releases
    with pytest.raises(PolicyError, match="taken (apart|out) again"):
        one.release(one.absorb(empty(one, 1), given), given)


@pytest.mark.parametrize(
    ("shape", "message"),
    [({"width": 0}, "at least 1"), ({"head_dims": ()}, "of each"), ({"kind": "mixed"}, "linear, slots")],
)
def test_shapes_that_cannot_be_are_refused(shape, message, unchecked):
    with pytest.raises(InputError, match=message):
        LatentConfig(**{"kind": "linear", "layers": (0,), "head_dims": (4,), "width": 3} | shape)


def test_a_memory_with_the_weights_of_another_kind_is_refused():
    with pytest.raises(PolicyError, match="memory 'slots' was given the weights of a linear memory"):
        Slots(latent=random_weights("linear"))
