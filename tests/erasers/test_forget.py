"""Taking spans out of a memory that is a sum: against the memory that never had them."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import random_latent
from vestige import Budget, KVCache, Span, attach, erase, forget, policies, prefill
from vestige.erasers import Blend, Drop, Learned, Repair, Shift
from vestige.memory import Linear, Moments, Slots
from vestige.memory.base import AbsorbedRanges, EvictedPairs, ForgetResult
from vestige.spans import within
from vestige.testing import left_padded, random_ids, tiny

MODEL = tiny("llama")
MEMORY = Linear(latent=random_latent(MODEL), dtype="float32")
SLOTS = Slots(latent=random_latent(MODEL, "slots"), dtype="float32")
KEPT = policies.StreamingLLM(budget=Budget.tokens(12), sink=2, window=4)


def read(ids, memory=MEMORY, mask=None, policy=KEPT) -> KVCache:
    cache = KVCache(MODEL, policy, memory=memory)
    with attach(MODEL), torch.no_grad():
        prefill(MODEL, ids, cache, chunk=ids.shape[1], attention_mask=mask)
    return cache


def without(cache: KVCache, whole: KVCache, spans: list[Span], memory=MEMORY) -> list[dict[str, torch.Tensor]]:
    """Return the states of a memory that was handed what a cache evicted, but for some spans."""
    states = []
    for layer, full in zip(cache.evictable, whole.evictable, strict=True):
        slots, lengths = [], []
        for row in range(layer.rows):
            places = full.positions(row)
            gone = (places >= 0) & ~torch.isin(places, layer.positions(row)) & ~within(places, spans)
            slots.append(full.starts[row] + gone.nonzero()[:, 0])
            lengths.append(int(gone.sum()))
        evicted = EvictedPairs.of(layer.layer_idx, full.columns, torch.cat(slots), lengths)
        states.append(memory.absorb(memory.empty(layer.rows, 16, 16, "cpu"), evicted))
    return states


def same(cache: KVCache, states) -> None:
    for layer, state in zip(cache.evictable, states, strict=True):
        for name in state:
            torch.testing.assert_close(layer.remains.state[name], state[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spans", [[Span(8, 13)], [Span(5, 7), Span(20, 31)], [Span(0, 40)]], ids=str)
@pytest.mark.parametrize("memory", [MEMORY, SLOTS], ids=["linear", "slots"])
def test_what_is_left_is_the_memory_that_never_had_the_spans(spans, memory):
    ids, mask = left_padded(MODEL, [40, 33])
    spans = [Span(one.start, min(one.end, 33)) for one in spans]
    cache, whole = read(ids, memory, mask), read(ids, memory, mask, policies.Full())
    before = [dict(layer.remains.state) for layer in cache.evictable]
    with attach(MODEL):
        assert forget(cache, spans, model=MODEL) is ForgetResult.SUBTRACTED
        same(cache, without(cache, whole, spans, memory))
        assert not torch.equal(cache.evictable[0].remains.state["count"], before[0]["count"])
        assert all(cache.forget(span) is ForgetResult.EXACT for span in spans)
        assert forget(cache, spans[0], model=MODEL) is ForgetResult.EXACT, "nothing is subtracted twice"
        same(cache, without(cache, whole, spans, memory))


@pytest.mark.parametrize("memory", [MEMORY, SLOTS], ids=["linear", "slots"])
def test_spans_that_overlap_are_forgotten_once(memory):
    ids = random_ids(MODEL, 1, 40)
    cache, whole = read(ids, memory), read(ids, memory, policy=policies.Full())
    with attach(MODEL):
        for span in (Span(8, 13), Span(10, 20), Span(6, 9)):
            assert forget(cache, span, model=MODEL) is ForgetResult.SUBTRACTED
        same(cache, without(cache, whole, [Span(6, 20)], memory))


def test_what_comes_to_pairs_that_are_out_already_cannot_be_told_from_them():
    """Heads evict different tokens at different times: of a token that is out, a pair that was held may come later."""
    ids = random_ids(MODEL, 1, 60)
    cache = read(ids[:, :40])
    with attach(MODEL), torch.no_grad():
        assert forget(cache, Span(24, 34), model=MODEL) is ForgetResult.SUBTRACTED  # 30 to 33 are held
        prefill(MODEL, ids[:, 40:], cache)  # and go now
        assert forget(cache, Span(24, 34), model=MODEL) is ForgetResult.IMPOSSIBLE
        assert forget(cache, Span(10, 20), model=MODEL) is ForgetResult.SUBTRACTED
        loaded = cache.fork()
        assert forget(loaded, Span(24, 34), model=MODEL) is ForgetResult.IMPOSSIBLE


@pytest.mark.parametrize("eraser", [Shift(), Repair(), Blend()], ids=lambda one: type(one).__name__)
def test_what_follows_a_span_that_closed_was_read_with_it_in_view_and_cannot_be_had_again(eraser):
    ids = random_ids(MODEL, 1, 40)
    cache = KVCache(MODEL, KEPT, memory=MEMORY)
    with attach(MODEL), torch.no_grad():
        prefill(MODEL, ids, cache, settle=False)
        erase(cache, Span(10, 16), eraser, model=MODEL, input_ids=ids)
        cache.settle()
        assert forget(cache, Span(12, 20), model=MODEL) is ForgetResult.IMPOSSIBLE
        assert forget(cache, Span(4, 9), model=MODEL) is ForgetResult.SUBTRACTED


def test_slots_as_they_are_stored_by_default_forget_up_to_rounding():
    ids, memory = random_ids(MODEL, 1, 40), Slots(latent=random_latent(MODEL, "slots"))
    cache, whole = read(ids, memory), read(ids, memory, policy=policies.Full())
    with attach(MODEL):
        assert forget(cache, Span(8, 13), model=MODEL) is ForgetResult.SUBTRACTED
    for layer, state in zip(cache.evictable, without(cache, whole, [Span(8, 13)], memory), strict=True):
        for name in state:
            torch.testing.assert_close(layer.remains.state[name], state[name], atol=1e-2, rtol=1e-2)


def test_a_span_of_which_nothing_was_absorbed_costs_nothing():
    cache = read(random_ids(MODEL, 1, 40))
    with attach(MODEL):
        assert forget(cache, Span(36, 40), model=MODEL) is ForgetResult.EXACT
    assert cache.state.absorbed.ranges == {0: (Span(2, 30),)}


@pytest.mark.parametrize(
    "memory", [Moments(), Linear(latent=random_latent(MODEL, decays=True))], ids=["moments", "fades"]
)
def test_sums_that_cannot_be_taken_apart_stay_as_they_are(memory):
    cache = read(random_ids(MODEL, 1, 40), memory)
    before = [layer.remains for layer in cache.evictable]
    with attach(MODEL):
        assert forget(cache, Span(8, 13), model=MODEL) is ForgetResult.IMPOSSIBLE
    assert all(layer.remains is one for layer, one in zip(cache.evictable, before, strict=True))


def test_pairs_that_an_eraser_replaced_cannot_be_had_again(monkeypatch):
    ids = random_ids(MODEL, 1, 40)
    cache = read(ids)
    with attach(MODEL):
        erase(cache, Span(8, 13), Drop(), model=MODEL, input_ids=ids)
        assert forget(cache, Span(10, 20), model=MODEL) is ForgetResult.IMPOSSIBLE
        assert forget(cache, Span(13, 20), model=MODEL) is ForgetResult.IMPOSSIBLE, "it was made with them in view"
        assert forget(cache, Span(3, 8), model=MODEL) is ForgetResult.SUBTRACTED


@pytest.mark.parametrize("memory", [MEMORY, SLOTS], ids=["linear", "slots"])
def test_what_was_read_behind_an_eviction_cannot_be_had_again(memory):
    """Its pairs were made with only some of the text in view; a replay would subtract other ones."""
    ids = random_ids(MODEL, 1, 60)
    cache = KVCache(MODEL, KEPT, memory=memory)
    with attach(MODEL), torch.no_grad():
        prefill(MODEL, ids, cache, chunk=24)
        before = [layer.remains for layer in cache.evictable]
        for span in (Span(26, 30), Span(20, 25)):
            assert forget(cache, span, model=MODEL) is ForgetResult.IMPOSSIBLE
        assert all(layer.remains is one for layer, one in zip(cache.evictable, before, strict=True))
        assert forget(cache, Span(8, 13), model=MODEL) is ForgetResult.SUBTRACTED


def test_what_was_taken_back_cannot_be_had_again():
    ids = random_ids(MODEL, 1, 40)
    cache = read(ids)
    with attach(MODEL), torch.no_grad():
        cache.crop(-14)  # 26 to 29 were absorbed
        prefill(MODEL, random_ids(MODEL, 1, 8, seed=1), cache)
        assert forget(cache, Span(26, 29), model=MODEL) is ForgetResult.IMPOSSIBLE
        assert forget(cache, Span(8, 13), model=MODEL) is ForgetResult.SUBTRACTED


class Same:
    """An adapter that changes nothing."""

    def applied(self, model):
        return self

    def __enter__(self):
        pass

    def __exit__(self, *args):
        pass


@pytest.mark.parametrize("eraser", [Drop(), Learned()], ids=["drop", "learned"])
@pytest.mark.parametrize("wanted", [False, True])
def test_erasers_that_keep_positions_free_the_memory_if_asked_to(eraser, wanted, monkeypatch):
    monkeypatch.setattr(Learned, "weights_for", lambda self, model: Same())
    ids, span = random_ids(MODEL, 1, 40), Span(26, 34)  # some are held
    cache, whole = read(ids), read(ids, policy=policies.Full())
    expected = without(cache, whole, [span] if wanted else [])
    done = erase(cache, span, replace(eraser, forget=wanted), model=MODEL, input_ids=ids).report
    same(cache, expected)
    own = len(span) if isinstance(eraser, Learned) else 0
    assert done.memory is (ForgetResult.SUBTRACTED if wanted else ForgetResult.IMPOSSIBLE)
    assert done.tokens_recomputed == own + (34 if wanted else 0)


def test_what_was_taken_out_leaves_the_ranges():
    absorbed = AbsorbedRanges({0: (Span(2, 9), Span(12, 20)), 1: (Span(0, 3),)})
    absorbed.remove(Span(5, 14))
    assert absorbed.ranges == {0: (Span(2, 5), Span(14, 20)), 1: (Span(0, 3),)}
    absorbed.remove(Span(0, 5))
    assert absorbed.ranges == {0: (Span(14, 20),), 1: ()}


def test_what_can_be_read_again_follows_the_rows():
    absorbed = AbsorbedRanges()
    absorbed.add(0, torch.tensor([4, 5]), 20)
    absorbed.add(1, torch.tensor([2]), 30)
    absorbed.add(0, torch.tensor([9]), 50)
    assert absorbed.replayable == {0: 20, 1: 30}
    twin = absorbed.copy()
    absorbed.crop([45, 25])
    assert absorbed.replayable == {0: 20, 1: 25} and twin.replayable == {0: 20, 1: 30}
    assert absorbed.select([1, 1, 0]).replayable == {0: 25, 1: 25, 2: 20}
