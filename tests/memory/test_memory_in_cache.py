"""Memories inside a cache, through the logits of tiny models.

The oracle is a memory that keeps every pair: with an exact estimate the merge must give full attention back, in every
phase and architecture, whatever was evicted.
"""

from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from vestige import Budget, BudgetError, CacheFileError, KVCache, PolicyError, Span, attach, memory, policies, prefill
from vestige.bench.methods import vestige_runner
from vestige.bench.methods.conversation import Job, TurnIds
from vestige.kernels.merge import PartialAttention
from vestige.memory import MEMORIES, Centroids, Moments
from vestige.memory.base import EvictedPairs, ForgetResult, Memory, MemoryQuery, State, log_count
from vestige.models.compat import cache_argument
from vestige.policies import POLICIES
from vestige.testing import TINY, left_padded, random_ids, tiny

NAMES = sorted(set(MEMORIES) - {"none"})
ESTIMATES = sorted(set(NAMES) - {"linear"})
"""What estimates attention over the evicted, well or badly."""
SMALL = {"sink": 2, "window": 3, "every": 4}
LLAMA = tiny("llama")


@dataclass(frozen=True, kw_only=True)
class Everything(Memory):
    """Keeps every evicted pair: what every other memory estimates, exactly."""

    def empty(self, rows: int, head_dim: int, value_dim: int, device: torch.device | str) -> State:
        sizes = {"keys": (0, head_dim), "values": (0, value_dim), "valid": (0,)}
        return {name: torch.zeros(rows, *size, device=device) for name, size in sizes.items()}

    def absorb(self, state: State, evicted: EvictedPairs) -> State:
        new = {"keys": evicted.keys, "values": evicted.values, "valid": evicted.valid.float()}
        return {name: torch.cat([state[name], x], 1) for name, x in new.items()}

    def recall(self, state: State, asked: MemoryQuery) -> PartialAttention:
        logits = asked.scale.capped(asked.queries @ state["keys"].mT * asked.scale.scaling)
        logits = logits + log_count(state["valid"])[:, None]
        return PartialAttention(logits.softmax(-1) @ state["values"], logits.logsumexp(-1))


@dataclass(frozen=True, kw_only=True)
class Forgetful(Everything):
    """Breaks in a layer in the middle."""

    def absorb(self, state: State, evicted: EvictedPairs) -> State:
        if evicted.layer_idx == 1:
            raise RuntimeError("out of memory")
        return super().absorb(state, evicted)


def policy(name: str = "random", tokens: int = 12, **options):
    return policies.resolve(name)(budget=Budget.tokens(tokens), **(SMALL | options))


def made(name: str, **options) -> Memory:
    cls = memory.resolve(name)
    assert cls is not None
    return cls(**options)


def conversation(model, cache, ids, mask) -> Float[Tensor, "batch some vocab"]:
    """Read in chunks, decode past a settle, read a turn with settles, decode: return all logits on the way."""
    given = torch.randint(1, 100, (ids.shape[0], 14), generator=torch.Generator().manual_seed(7))
    cut = ids.shape[1] - 8
    with torch.no_grad(), attach(model):
        logits = [prefill(model, ids[:, :cut], cache, chunk=9, attention_mask=mask[:, :cut])]
        logits += [prefill(model, given[:, i : i + 1], cache, settle=False) for i in range(3)]
        cache.settle()
        logits += [prefill(model, given[:, i : i + 1], cache, settle=False) for i in range(3, 7)]
        logits += [prefill(model, ids[:, cut:], cache, chunk=5)]
        logits += [prefill(model, given[:, i : i + 1], cache, settle=False) for i in range(7, 14)]
    return torch.stack(logits, 1)


def read(one: Memory | None, chosen=None, *, model=LLAMA, lengths=(40, 27), chunk: int = 16) -> KVCache:
    cache = KVCache(model, chosen or policy(), memory=one)
    ids, mask = left_padded(model, list(lengths))
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, chunk=chunk, attention_mask=mask)
    return cache


def step(cache: KVCache, token: int = 5) -> Tensor:
    """Return the logits of one more token of each batch row, on a fork."""
    fork = cache.fork()
    with torch.no_grad(), attach(LLAMA):
        return prefill(LLAMA, torch.full((len(cache.seen), 1), token), fork, settle=False)


def states(cache: KVCache) -> list[Tensor]:
    remains = [layer.remains.state for layer in cache.evictable if layer.remains]
    return [state[name] for state in remains for name in sorted(state)]


def contents(cache: KVCache) -> list[Tensor]:
    """Return all tensors of a cache, pairs without slack."""
    pairs = [layer.columns[x][layer.live_slots()[0]] for layer in cache.evictable for x in sorted(layer.columns)]
    return [*pairs, *(ring.data for layer in cache.evictable for ring in layer.rings.values()), *states(cache)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# The oracle.


@pytest.mark.parametrize(
    ("name", "share"), [*((name, "model") for name in TINY), ("llama", "head"), ("gpt_oss", "head")]
)
def test_an_exact_memory_gives_full_attention_back_in_every_phase(name, share):
    model = tiny(name)
    ids, mask = left_padded(model, [40, 26], seed=2)
    remembering = KVCache(model, policy(share=share), memory=Everything())
    expected = conversation(model, KVCache(model, policies.Full()), ids, mask)
    got = conversation(model, remembering, ids, mask)
    assert remembering.ragged and remembering.report().held < remembering.report().full / 2
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    without = conversation(model, KVCache(model, policy(share=share)), ids, mask)
    assert (without - expected).abs().max() > 1e-2, "the evicted pairs did not matter: the test would prove nothing"


def test_an_exact_memory_is_as_good_as_the_pairs_in_bfloat16():
    model = tiny("llama", dtype=torch.bfloat16)
    ids, mask = left_padded(model, [40, 26], seed=2)
    expected, got, without = (
        conversation(model, KVCache(model, chosen, memory=one), ids, mask)
        for chosen, one in ((policies.Full(), None), (policy(), Everything()), (policy(), None))
    )
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() < 0.05 * (without - expected).norm()


@pytest.mark.parametrize("name", ["linear", "slots"])
def test_a_trained_memory_says_in_bfloat16_what_it_says_in_float32(name):
    said = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama", dtype=dtype)
        kept = policies.StreamingLLM(budget=Budget.tokens(12), sink=2, window=4)
        cache = KVCache(model, kept, memory=memory.make(name))
        said.append(conversation(model, cache, *left_padded(model, [40, 26], seed=2)).float())
        without = conversation(model, KVCache(model, kept), *left_padded(model, [40, 26], seed=2)).float()
    assert (said[1] - said[0]).norm() < 0.3 * (said[1] - without).norm()


def test_gradients_of_a_question_are_those_of_full_attention():
    ids = random_ids(LLAMA, 1, 40)
    embedded = LLAMA.get_input_embeddings()(random_ids(LLAMA, 1, 3, seed=1)).detach()
    gradients = []
    for cache in (KVCache(LLAMA, policies.Full()), KVCache(LLAMA, policy(), memory=Everything())):
        with attach(LLAMA):
            with torch.no_grad():
                prefill(LLAMA, ids, cache)
            given = embedded.clone().requires_grad_()
            cache.state.schedule.reading = True
            logits = LLAMA(inputs_embeds=given, **cache_argument(cache)).logits
        (gradient,) = torch.autograd.grad(logits.square().sum(), given)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)
    assert gradients[0].abs().max() > 0.1


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("model_name", ["llama", "gemma2", "gpt_oss", "gemma4"])
def test_one_evicted_pair_a_row_is_not_missed(name, model_name):
    model = tiny(model_name)
    ids, mask = left_padded(model, [20, 20])
    logits = []
    for chosen, one in ((policies.Full(), None), (policy("knorm", 19), made(name, dtype="float32"))):
        cache = KVCache(model, chosen, memory=one)
        with torch.no_grad(), attach(model):
            prefill(model, ids, cache, attention_mask=mask)
            turn = prefill(model, random_ids(model, 2, 5, seed=3), cache, settle=False)
            logits.append(torch.stack([turn, prefill(model, ids[:, :1], cache, settle=False)]))
    assert all(n == 19 + 6 for layer in cache.evictable for n in layer.live_lengths())
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["centroids", "moments"])
def test_memories_bring_the_logits_nearer_to_full_attention(name):
    ids, mask = left_padded(LLAMA, [40, 31])
    full, without, remembered = (
        conversation(LLAMA, KVCache(LLAMA, chosen, memory=one), ids, mask)
        for chosen, one in ((policies.Full(), None), (policy("snapkv"), None), (policy("snapkv"), made(name)))
    )
    assert (remembered - full).norm() < 0.7 * (without - full).norm()


# Invariants.


@pytest.mark.parametrize("share", ["head", "layer", "model"])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_row_alone_equals_that_row_in_a_left_padded_batch(name, share):
    ids, mask = left_padded(LLAMA, [40, 31, 18])
    together = KVCache(LLAMA, policy("keydiff", share=share), memory=made(name))
    question, asked = left_padded(LLAMA, [6, 3, 6], seed=4)
    with torch.no_grad(), attach(LLAMA):
        prefill(LLAMA, ids, together, attention_mask=mask)
        logits = prefill(LLAMA, question, together, settle=False, attention_mask=asked)
        for b, (pads, late) in enumerate(((0, 0), (9, 3), (22, 0))):
            alone = KVCache(LLAMA, policy("keydiff", share=share), memory=made(name))
            prefill(LLAMA, ids[b : b + 1, pads:], alone)
            expected = prefill(LLAMA, question[b : b + 1, late:], alone, settle=False)
            torch.testing.assert_close(logits[b : b + 1], expected, atol=1e-4, rtol=1e-4)
            assert alone.state.absorbed.ranges[0] == together.state.absorbed.ranges[b]
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("policy_name", sorted(set(POLICIES) - {"full"}))
@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_all_that_was_seen_changes_no_bit(name, policy_name):
    caches, logits = [], []
    ids, mask = left_padded(LLAMA, [30, 19])
    for chosen, one in ((policy(policy_name, 100), None), (policy(policy_name, 100), made(name))):
        caches.append(KVCache(LLAMA, chosen, memory=one))
        logits.append(conversation(LLAMA, caches[-1], ids, mask))
    assert torch.equal(*logits) and same(*map(contents, caches))
    assert [cache.report().memory_bytes for cache in caches] == [0, 0]
    assert caches[0].report().kv_bytes == caches[1].report().kv_bytes


@pytest.mark.parametrize("share", ["head", "model"])
@pytest.mark.parametrize("name", NAMES)
def test_every_pair_seen_is_held_or_counted_whenever_it_was_evicted(name, share):
    model = LLAMA
    cache = KVCache(model, policy("snapkv", share=share), memory=made(name))
    ids, mask = left_padded(model, [40, 22])
    conversation(model, cache, ids, mask)
    assert cache.seen == (54, 36)
    for layer in cache.evictable:
        gone = layer.remains.state["count"].view(layer.rows, -1).sum(1).tolist() if layer.remains else [0] * layer.rows
        for row, (held, lost) in enumerate(zip(layer.live_lengths(), gone, strict=True)):
            assert held + lost == cache.seen[row // layer.kv_heads]
    assert cache.report().memory_bytes > 0


def test_moments_do_not_depend_on_the_chunks():
    """StreamingLLM evicts the same pairs whatever the chunks."""
    whole, chunked = (read(Moments(dtype="float32"), policy("streaming_llm"), chunk=chunk) for chunk in (40, 7))
    for one, other in zip(whole.evictable, chunked.evictable, strict=True):
        values = [
            {x: y for x, y in layer.remains.state.items() if x in ("count", "key_mean", "value_mean")}
            for layer in (one, other)
        ]
        assert values[0]["count"].tolist() == values[1]["count"].tolist() == [28, 28, 15, 15]
    first = [layer.remains.state["key_mean"] for layer in (whole.evictable[0], chunked.evictable[0])]
    torch.testing.assert_close(*first, atol=1e-5, rtol=1e-5)  # later layers see what attention lost on the way


def test_nothing_changes_if_selection_or_a_memory_breaks():
    @dataclass(frozen=True, kw_only=True)
    class Broken(policies.KNorm):
        def score(self, seen):
            return super().score(seen) * (torch.nan if seen.seen[0] > 30 else 1)

    ids = random_ids(LLAMA, 1, 60)
    cases = ((Broken(budget=Budget.tokens(12), **SMALL), Moments(), "NaN"), (policy(), Forgetful(), "out of memory"))
    for chosen, one, message in cases:
        cache = KVCache(LLAMA, chosen, memory=one)
        with torch.no_grad(), attach(LLAMA):
            if message == "NaN":
                prefill(LLAMA, ids[:, :20], cache)
            prefill(LLAMA, ids[:, 20:], cache, settle=False)
            before, held, noted = contents(cache), cache.held, dict(cache.state.absorbed.ranges)
            with pytest.raises((PolicyError, RuntimeError), match=message):
                cache.settle()
            assert cache.held == held and same(contents(cache), before) and cache.state.absorbed.ranges == noted


# Verbs.


@pytest.mark.parametrize("name", NAMES)
def test_forks_do_not_share_states(name):
    cache = read(made(name))
    fork, before = cache.fork(), [x.clone() for x in states(cache)]
    assert same(states(fork), states(cache)) and fork.state.absorbed.ranges == cache.state.absorbed.ranges
    assert not {x.data_ptr() for x in states(fork)} & {x.data_ptr() for x in states(cache)}
    ids, mask = left_padded(LLAMA, [20, 20], seed=5)
    with torch.no_grad(), attach(LLAMA):
        prefill(LLAMA, ids, fork, attention_mask=mask)
    assert same(states(cache), before)
    assert not same(states(fork), before) and fork.state.absorbed.ranges != cache.state.absorbed.ranges


def test_a_fork_of_an_unevicted_reading_may_have_another_memory_and_one_of_an_evicted_reading_may_not():
    whole = read(None, policies.Full())
    for one in (Moments(), Centroids(), None):
        fork = whole.fork(policy("knorm"), memory=one)
        fork.settle()
        direct = read(one, policy("knorm"), chunk=100)
        assert same(states(fork), states(direct)) and torch.equal(step(fork), step(direct))
        assert fork.memory == one and (fork.report().memory_bytes > 0) == (one is not None)
    evicted = read(Moments())
    assert evicted.fork(policy("knorm")).memory == Moments()
    assert evicted.fork(memory=Moments()).memory == Moments()
    for other in (None, Centroids(), Moments(mass=1.0)):
        with pytest.raises(PolicyError, match=r"evicted already, so the memory stays Moments\(.*; .* came too late"):
            evicted.fork(memory=other)


def test_reset_clears_the_memory_and_keeps_its_kind():
    cache = read(Moments())
    cache.reset()
    assert cache.memory == Moments() and not states(cache) and not cache.state.absorbed.ranges
    assert cache.report().memory_bytes == 0
    ids, mask = left_padded(LLAMA, [40, 27])
    with torch.no_grad(), attach(LLAMA):
        prefill(LLAMA, ids, cache, chunk=16, attention_mask=mask)
    assert torch.equal(step(cache), step(read(Moments())))


@pytest.mark.parametrize("name", NAMES)
def test_batch_rows_take_their_memories_along(name):
    cache = read(made(name), policy(share="model"))
    logits, ranges = step(cache), cache.state.absorbed.ranges
    repeated, reordered, chosen = cache.fork(), cache.fork(), cache.fork()
    repeated.batch_repeat_interleave(2)
    reordered.reorder_cache(torch.tensor([1, 0]))
    chosen.batch_select_indices(torch.tensor([1]))
    for got, rows in ((repeated, [0, 0, 1, 1]), (reordered, [1, 0]), (chosen, [1])):
        torch.testing.assert_close(step(got), logits[rows], atol=1e-5, rtol=1e-5)
        assert got.state.absorbed.ranges == {new: ranges[old] for new, old in enumerate(rows)}
        assert got.report().memory_bytes == cache.report().memory_bytes * len(rows) / 2


def test_crop_leaves_the_memory():
    cache = read(Moments())
    before, ranges = [x.clone() for x in states(cache)], dict(cache.state.absorbed.ranges)
    cache.crop(-20)
    assert same(states(cache), before) and cache.state.absorbed.ranges == ranges


@pytest.mark.parametrize(
    "one", [*map(made, NAMES), Moments(mass=2.0, dtype="float32"), Centroids(centroids=3)], ids=str
)
@pytest.mark.parametrize("model_name", ["llama", "gemma3"])
def test_save_and_load_are_the_identity(one, model_name, tmp_path):
    model = tiny(model_name)
    cache = read(one, policy("snapkv", share="model"), model=model)
    with attach(model), torch.no_grad():
        cache.save(tmp_path / "kept")
        loaded = KVCache.load(tmp_path / "kept", model)
        assert loaded.memory == one and loaded.state.absorbed.ranges == cache.state.absorbed.ranges
        assert same(contents(cache), contents(loaded)) and len(states(loaded)) > 0
        assert [x.dtype for x in states(cache)] == [x.dtype for x in states(loaded)]
        assert loaded.report().memory_bytes == cache.report().memory_bytes
        more, mask = left_padded(model, [20, 11], seed=8)
        logits = [prefill(model, more, x, chunk=6, attention_mask=mask) for x in (cache, loaded)]
    assert torch.equal(*logits) and same(contents(cache), contents(loaded))


def test_a_memory_without_a_name_is_not_saved(tmp_path):
    with pytest.raises(CacheFileError, match="memory Everything cannot be saved: it is not one of none, centroids"):
        read(Everything()).save(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


# Forgetting.


def test_a_span_is_forgotten_exactly_until_a_pair_of_it_was_absorbed():
    cache = KVCache(LLAMA, policy("streaming_llm"), memory=Moments())
    assert cache.forget(Span(0, 5)) is ForgetResult.EXACT
    ids, mask = left_padded(LLAMA, [40, 20])
    with torch.no_grad(), attach(LLAMA):
        prefill(LLAMA, ids, cache, attention_mask=mask)  # holds 0, 1 and the last ten
        assert cache.state.absorbed.ranges == {0: (Span(2, 30),), 1: (Span(2, 10),)}
        assert cache.forget(Span(0, 2)) is cache.forget(Span(30, 40)) is ForgetResult.EXACT
        for impossible in (Span(0, 3), Span(5, 6), Span(29, 31), Span(0, 100)):
            assert cache.forget(impossible) is ForgetResult.IMPOSSIBLE
        cache.pin(Span(30, 34))
        prefill(LLAMA, ids[:, :7], cache)
        assert cache.forget(Span(30, 34)) is ForgetResult.EXACT
        assert cache.forget(Span(34, 35)) is ForgetResult.IMPOSSIBLE
    assert {one.value for one in ForgetResult} == {"exact", "subtracted", "rebuilt", "impossible"}


def test_without_a_memory_every_span_is_forgotten():
    cache = read(None)
    assert cache.ragged and cache.forget(Span(0, 40)) is ForgetResult.EXACT and not cache.state.absorbed.ranges


# Bytes.


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_states_are_reported_as_they_are_and_paid_by_budgets_in_bytes(name):
    one, rows = made(name).bind(LLAMA), 2 * 6
    weight = one.state_bytes(16, 16) * rows
    cache = read(one, policy("snapkv"))
    report = cache.report()
    live = {x.data_ptr(): x.untyped_storage().nbytes() for x in contents(cache)}
    assert report.memory_bytes == sum({x.data_ptr(): x.untyped_storage().nbytes() for x in states(cache)}.values())
    assert report.memory_bytes == weight and report.kv_bytes == cache.state.nbytes
    assert report.kv_bytes == read(None, policy("snapkv")).report().kv_bytes + weight
    assert sum(live.values()) == report.kv_bytes
    assert report.peak_kv_bytes >= report.kv_bytes + weight
    assert f"; memory {weight:,})" in str(report)
    pair = rows * (2 * 16 * 4 + 4)
    for given in (None, one):
        chosen = policies.KNorm(budget=Budget.bytes(30 * pair + weight), **SMALL)
        room = read(given, chosen, chunk=40, lengths=(60, 55)).report()
        slack = SMALL["every"]
        assert room.held == (30 - slack + (0 if given else weight // pair)) * rows
        assert room.kv_bytes <= 30 * pair + weight


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_in_bytes_that_the_states_eat_up_is_refused_at_once(name):
    one, pair = made(name).bind(LLAMA), 2 * 16 * 4 + 4
    budget = Budget.bytes(6 * (5 * pair + one.state_bytes(16, 16)))
    KVCache(LLAMA, policies.KNorm(budget=budget, **SMALL), memory=one)
    with pytest.raises(BudgetError, match="gives 4 pairs a row, but sink and window protect 5"):
        KVCache(LLAMA, policies.KNorm(budget=Budget.bytes(budget.amount - 6), **SMALL), memory=one)


def test_the_state_and_the_peak_do_not_grow_with_the_text():
    reports = [read(Centroids(), policy(tokens=16), lengths=(n,), chunk=16).report() for n in (48, 96)]
    assert len({report.memory_bytes for report in reports}) == 1
    assert max(r.peak_kv_bytes for r in reports) <= 1.02 * min(r.peak_kv_bytes for r in reports)


# The benchmark's runner.


@pytest.mark.parametrize("one", [None, Moments(), Centroids()], ids=str)
def test_an_arm_on_a_shared_reading_is_its_own_prefill(one):
    ids = random_ids(LLAMA, 1, 65)[0].tolist()
    job = Job(turns=(TurnIds(context=tuple(ids[:60]), question=tuple(ids[60:]), max_new_tokens=6),), stop=())
    chosen = policy("snapkv")
    with torch.no_grad(), attach(LLAMA):
        reading = vestige_runner.read(LLAMA, [job], [chosen])
        shared, own = (
            vestige_runner.run(LLAMA, [job], chosen, memory=one, reading=given)[0] for given in (reading, None)
        )
        direct = KVCache(LLAMA, chosen, memory=one)
        prefill(LLAMA, torch.tensor([job.turns[0].context]), direct, chunk=100)
    assert shared.replies == own.replies and shared.kv_bytes == own.kv_bytes == direct.report().kv_bytes
    assert shared.memory_bytes == own.memory_bytes == direct.report().memory_bytes
    assert (shared.memory_bytes > 0) == (one is not None)
