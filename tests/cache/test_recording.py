"""What is recorded while a cache is filled, and what those are shown who look at every query as it attends."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOMY
from vestige import Budget, KVCache, Observation, PolicyError, attach, check, policies, prefill
from vestige.cache.recording import RecordingSpec
from vestige.models.compat import cache_argument
from vestige.policies.base import NewPairs, Policy
from vestige.policies.observation import LayerView, RowView
from vestige.policies.scoring import compute_attention
from vestige.testing import TINY, attention, full_layers, left_padded, random_ids, tiny

SMALL = {"sink": 2, "window": 3, "every": 4}


@dataclass(frozen=True, kw_only=True)
class Notes(Policy):
    """Writes a number beside each pair."""

    number: float = 1.0
    annotations: ClassVar[frozenset[str]] = frozenset({"note"})
    annotation_options: ClassVar[tuple[str, ...]] = ("number",)

    def annotate(self, written: NewPairs) -> Mapping[str, Tensor]:
        return {"note": torch.full(written.keys.shape[:3], self.number)}

    def score(self, seen: Observation) -> Tensor:
        return seen.annotations["note"]


@dataclass(frozen=True, kw_only=True)
class Sums(Policy):
    """Adds up the attention that each pair ever got: a watcher with a side array of its own."""

    annotations: ClassVar[frozenset[str]] = frozenset({"mass"})

    def annotate(self, written: NewPairs) -> Mapping[str, Tensor]:
        return {"mass": torch.zeros(written.keys.shape[:3])}

    def watch(self, glance: RowView) -> None:
        weights = compute_attention(
            glance.queries, glance.query_positions, glance.keys, glance.positions, glance.attention
        )
        glance.annotations["mass"].add_(weights.sum((0, 1)))

    def score(self, seen: Observation) -> Tensor:
        return seen.annotations["mass"]


class Watcher(policies.KNorm):
    """Keeps what it is shown."""

    def watch(self, glance: RowView) -> None:
        seen.append(glance)


seen: list[RowView] = []


@pytest.fixture(autouse=True)
def nothing_seen_yet():
    seen.clear()


# The union of what policies need.


def test_policies_that_look_back_at_nothing_record_nothing():
    assert RecordingSpec.of([policies.Full(), policies.KNorm(budget=ROOMY)]) == RecordingSpec()
    assert RecordingSpec.of([]).longest_ring == 0


def test_of_several_policies_the_longest_ring_and_all_needs_are_recorded():
    chosen = [policies.SnapKV(budget=ROOMY, observed=n) for n in (5, 9, 7)]
    recording = RecordingSpec.of([*chosen, policies.LaProx(budget=ROOMY, observed=3), policies.TOVA(budget=ROOMY)])
    assert recording.needs == {"queries", "output"}
    assert recording.ring_sizes == {"queries": 9} and recording.longest_ring == 9
    assert recording.annotations == {"output_norms"} and recording.watchers == ()


def test_policies_that_write_the_same_write_it_once():
    one, other = Notes(budget=ROOMY), Notes(budget=Budget.tokens(20), sink=0, window=0, share="model")
    assert len(RecordingSpec.of([one, other, one]).writers) == 1
    assert len(RecordingSpec.of([Watcher(budget=ROOMY), Watcher(budget=ROOMY, window=1)]).watchers) == 1
    assert RecordingSpec.of([one, policies.LaProx(budget=ROOMY)]).annotations == {"note", "output_norms"}


def test_two_policies_that_would_write_different_things_into_one_array_are_refused():
    with pytest.raises(PolicyError, match=r"two policies would write different things into the side array 'note'"):
        RecordingSpec.of([Notes(budget=ROOMY), Notes(budget=ROOMY, number=2.0)])


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (
            policies.SnapKV(budget=ROOMY, observed=9),
            r"SnapKV needs queries \(9\), this cache recorded note, queries \(8\)",
        ),
        (policies.LaProx(budget=ROOMY, observed=8), r"LaProx needs output, output_norms, queries \(8\), this cache"),
        (Sums(budget=ROOMY), r"Sums needs mass, this cache recorded note, queries \(8\)"),
    ],
)
def test_what_was_not_recorded_is_named_with_what_was(policy, told):
    recording = RecordingSpec.of([policies.SnapKV(budget=ROOMY, observed=8), Notes(budget=ROOMY)])
    with pytest.raises(PolicyError, match=told + r".*observers=\[...\]"):
        recording.check(policy)


def test_what_was_recorded_and_less_is_enough():
    recording = RecordingSpec.of([policies.SnapKV(budget=ROOMY, observed=8), Notes(budget=ROOMY)])
    for policy in (policies.SnapKV(budget=ROOMY, observed=3), policies.TOVA(budget=ROOMY), Notes(budget=None)):
        recording.check(policy)


def test_a_side_array_of_another_name_than_promised_is_refused():
    class Wrong(Notes):
        def annotate(self, written):
            return {"remark": torch.zeros(written.keys.shape[:3])}

    model = tiny("llama")
    cache = KVCache(model, Wrong(budget=ROOMY))
    with (
        torch.no_grad(),
        attach(model),
        pytest.raises(PolicyError, match=r"gave the side arrays \['remark'\], not \['note'\]"),
    ):
        model(random_ids(model, 1, 5), **cache_argument(cache))


# Side arrays travel with their pairs.


def test_side_arrays_go_with_their_pairs_and_only_with_them():
    class Places(Notes):
        def annotate(self, written):
            self.made.append(written.keys.shape[2])
            start = sum(self.made[:-3:3])  # of three layers
            return {"note": (start + torch.arange(written.keys.shape[2])).expand(written.keys.shape[:3]).float()}

        def score(self, seen):
            return -(seen.annotations["note"] - 20).abs()

        made: ClassVar[list[int]] = []

    model = tiny("llama")
    cache = KVCache(model, Places(budget=Budget.tokens(10), **SMALL))
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 2, 40), cache, chunk=13)
        cache.reorder_cache(torch.tensor([1, 0]))
    for layer in cache.evictable:
        for row in range(layer.rows):
            pairs = slice(layer.starts[row], layer.starts[row] + layer.lengths[row])
            assert layer.columns["note"][pairs].tolist() == layer.positions(row).tolist() != list(range(10))


# What watchers are shown.


def eager(model, ids) -> dict[int, Tensor]:
    """Return the attention of every layer that keeps all pairs: heads x queries x pairs of one batch row."""
    with torch.no_grad(), attention(model, "eager"):
        weights = model(ids, output_attentions=True, use_cache=False).attentions
    return {i: weights[i][0] for i in full_layers(model)}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss"])
def test_a_watcher_can_tell_the_attention_that_every_query_pays(name):
    model = tiny(name)
    ids = random_ids(model, 1, 24)
    cache = KVCache(model, Sums(budget=ROOMY, **SMALL))
    with torch.no_grad(), attach(model):
        prefill(model, ids[:, :19], cache, chunk=7)
        for i in range(19, 24):
            model(ids[:, i : i + 1], **cache_argument(cache))
    for layer, weights in eager(model, ids).items():
        expected = weights.sum(1).unflatten(0, (2, -1)).sum(1)  # (kv_heads, pairs)
        stored = next(x for x in cache.evictable if x.layer_idx == layer).view("mass")[0]
        torch.testing.assert_close(stored, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(TINY) - {"gemma4"}))
def test_each_query_is_shown_once_to_each_row_with_its_own_pair(name):
    model = tiny(name)
    cache = KVCache(model, Watcher(budget=ROOMY, **SMALL))
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 2, 9), cache, chunk=5)
    rows = [(g.layer_idx, g.batch, g.kv_head) for g in seen]
    once = [(i, b, h) for i in full_layers(model) for b in range(2) for h in range(2)]
    assert rows == once * 2
    for number, glance in enumerate(seen):
        begin, end = (0, 5) if number < len(once) else (5, 9)
        assert glance.query_positions.tolist() == list(range(begin, end))
        assert glance.positions.tolist() == list(range(end))
        assert glance.queries.shape[:2] == (2, end - begin)


def test_layers_that_read_the_pairs_of_others_show_nothing_of_their_own():
    model = tiny("gemma4")
    cache = KVCache(model, Watcher(budget=ROOMY, **SMALL))
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 6), cache)
    assert sorted({g.layer_idx for g in seen}) == [layer.layer_idx for layer in cache.evictable] == full_layers(model)
    assert len(seen) == sum(layer.kv_heads for layer in cache.evictable)


@pytest.mark.parametrize("evicted", [False, True], ids=["dense", "ragged"])
def test_pads_are_not_shown_as_queries_and_rows_of_pads_not_at_all(evicted):
    model = tiny("llama")
    ids, mask = left_padded(model, [30, 21])
    cache = KVCache(model, Watcher(budget=Budget.tokens(10) if evicted else ROOMY, **SMALL))
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, attention_mask=mask)
        first = [g.query_positions.tolist() for g in seen if g.batch == 1]
        assert first == [list(range(21))] * 6
        seen.clear()
        more, more_mask = left_padded(model, [4, 2], seed=1)
        prefill(model, more, cache, settle=False, attention_mask=more_mask)
        assert {b: [g.query_positions.tolist() for g in seen if g.batch == b] for b in (0, 1)} == {
            0: [[30, 31, 32, 33]] * 6,
            1: [[21, 22]] * 6,
        }
        real = [[p for p in g.positions.tolist() if p >= 0] for g in seen if g.batch == 1]
        assert all(p[-2:] == [21, 22] and len(p) == (12 if evicted else 23) for p in real)
        seen.clear()
        prefill(model, more, cache, settle=False, attention_mask=torch.tensor([[1] * 4, [0] * 4]))
    assert {g.batch for g in seen} == {0}


def test_what_a_watcher_writes_is_evicted_and_saved_with_the_pairs():
    model = tiny("llama")
    ids = random_ids(model, 1, 40)
    whole, cache = KVCache(model, Sums(budget=ROOMY, **SMALL)), KVCache(model, Sums(budget=Budget.tokens(10), **SMALL))
    with torch.no_grad(), attach(model):
        for one in (whole, cache):
            prefill(model, ids, one)
    assert cache.ragged and not whole.ragged
    for layer, full in zip(cache.evictable, whole.evictable, strict=True):
        for row in range(2):
            pairs = slice(layer.starts[row], layer.starts[row] + layer.lengths[row])
            expected = full.view("mass")[0, row][layer.positions(row).long()]
            assert torch.equal(layer.columns["mass"][pairs], expected)


def test_a_fork_to_another_policy_is_watched_no_longer():
    model = tiny("llama")
    cache = KVCache(model, policies.KNorm(budget=ROOMY), observers=[Watcher(budget=ROOMY)])
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 9), cache)
        assert len(seen) == 6
        fork = cache.fork(policies.KNorm(budget=Budget.tokens(40)))
        prefill(model, random_ids(model, 1, 5), fork)
        assert len(seen) == 6
        prefill(model, random_ids(model, 1, 5), cache)
        assert len(seen) == 12


# What is shown of a layer as a whole.


@dataclass(frozen=True, kw_only=True)
class Overseer(Notes):
    """Keeps what it is shown of layers."""

    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def watch_layer(self, glance: LayerView) -> None:
        shown.append((glance, glance.rows, {name: x.clone() for name, x in glance.slots.items()}))


shown: list[tuple[LayerView, tuple[RowView, ...], dict[str, Tensor]]] = []


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4"])
@pytest.mark.parametrize("evicted", [False, True], ids=["dense", "ragged"])
def test_a_layer_is_shown_with_all_its_rows_and_what_made_the_queries(name, evicted):
    shown.clear()
    model = tiny(name)
    ids, mask = left_padded(model, [30, 21])
    cache = KVCache(model, Overseer(budget=Budget.tokens(10) if evicted else ROOMY, share="model", **SMALL))
    entered = {}

    def note(module, args, kwargs):
        entered[module.layer_idx] = kwargs["hidden_states"]

    modules = check(model).attentions.values()
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, attention_mask=mask)
        shown.clear()
        more, more_mask = left_padded(model, [4, 2], seed=1)
        prefill(model, more, cache, settle=False, attention_mask=more_mask)
    for hook in hooks:
        hook.remove()
    assert [(one.layer_idx, rows[0].batch) for one, rows, _ in shown] == [
        (layer.layer_idx, b) for layer in cache.evictable for b in (0, 1)
    ]
    for one, rows, slots in shown:
        b = rows[0].batch
        new = 4 if b == 0 else 2
        assert one.query_positions.tolist() == ([30, 31, 32, 33] if b == 0 else [21, 22])
        assert one.model is model and torch.equal(one.hidden, entered[one.layer_idx][b, -new:])
        assert torch.equal(one.queries, torch.cat([row.queries for row in rows])) and one.queries.shape[1] == new
        layer = next(x for x in cache.evictable if x.layer_idx == one.layer_idx)
        assert [row.kv_head for row in rows] == list(range(layer.kv_heads))
        assert slots.keys() == {"note"} and len(one.heads) == len(slots["note"])
        for row in rows:
            real = int((row.positions >= 0).sum())
            assert int((one.heads == row.kv_head).sum()) >= real, "free slots follow the row before them"


def test_slots_are_found_anew_after_an_eviction():
    shown.clear()
    model = tiny("llama")
    cache = KVCache(model, Overseer(budget=Budget.tokens(10), **SMALL))
    with torch.no_grad(), attach(model):
        for _ in range(3):
            prefill(model, random_ids(model, 1, 16), cache)
            glance, rows, slots = shown[-1]
            held = torch.cat([row.annotations["note"] for row in rows])
            assert bool((held == 1.0).all()) and len(slots["note"]) >= len(held)
            starts = [int((glance.heads == head).nonzero()[0]) for head in range(2)]
            for start, row in zip(starts, rows, strict=True):
                part = slots["note"][start : start + len(row.annotations["note"])]
                assert torch.equal(part, row.annotations["note"])
