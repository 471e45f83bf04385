"""Expected attention and Compactor: moments of queries, chunk attention and leverage, against naive ones."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import made
from tests.policies.test_policies import EXTRAS, random_observation
from vestige import Budget, InputError, KVCache, PolicyError, attach, check, policies, prefill
from vestige.cache.query_records import Moments, QueryMoments
from vestige.kernels import AttentionScale
from vestige.models.forward import forward, replay
from vestige.policies.base import NewPairs
from vestige.policies.observation import RowView
from vestige.testing import left_padded, random_ids, tiny

OPEN = Budget.tokens(10_000)


def expected_attention(**options: Any) -> policies.ExpectedAttention:
    return policies.ExpectedAttention(**{"budget": OPEN, "sink": 2, "window": 3} | options)


def compactor(**options: Any) -> policies.Compactor:
    return policies.Compactor(**{"budget": OPEN, "sink": 2, "window": 3} | options)


def moments_of(cache: KVCache) -> list[tuple[Moments, ...]]:
    """Return, by layer, what a policy would be shown of each batch row."""
    return [layer.rings["query_moments"].latest(cache.seen) for layer in cache.evictable]


def assert_same_moments(left: Any, right: Any, tolerance: float = 1e-5) -> None:
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(tuple(a), tuple(b), atol=tolerance, rtol=tolerance)


def projected_queries(model: Any, ids: Tensor, layer_idx: int) -> Tensor:
    """Return ``batch heads new head_dim`` queries before RoPE, from a forward without a cache, in float64."""
    found: list[Tensor] = []
    attention = check(model).attentions[layer_idx]
    hook = attention.q_proj.register_forward_hook(lambda _, __, out: found.append(out))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return found[-1].double().unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


# Moments of queries.


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "smollm3"])  # plain; scaled angles; a layer without RoPE
def test_moments_over_chunks_turns_and_steps_equal_those_of_all_projected_queries(name):
    model = tiny(name)
    ids = random_ids(model, 2, 60)
    cache = KVCache(model, expected_attention())
    with torch.no_grad(), attach(model):
        prefill(model, ids[:, :37], cache, chunk=9)
        prefill(model, ids[:, 37:52], cache, settle=False)
        for i in range(52, 60):
            forward(model, ids[:, i : i + 1], cache)
    for layer_idx, shown in zip(check(model).evictable, moments_of(cache), strict=True):
        queries = projected_queries(model, ids, layer_idx)[:, :, 4:]
        for b in range(2):
            for head in range(4):
                torch.testing.assert_close(shown[b].mean[head].double(), queries[b, head].mean(0), atol=1e-5, rtol=1e-5)
                covariance = torch.cov(queries[b, head].T, correction=0)
                torch.testing.assert_close(shown[b].covariance[head].double(), covariance, atol=1e-5, rtol=1e-5)


def test_merging_is_exact_far_from_zero_where_sums_of_squares_are_not():
    generator = torch.Generator().manual_seed(0)
    queries = 300 + torch.randn(1, 2, 500, 8, generator=generator)
    moments, at = QueryMoments.like(queries, 1, (0,)), torch.arange(500)[None]
    for start in range(0, 500, 7):
        part = dataclasses.replace(step_of(at), positions=at[:, start : start + 7])
        moments.record(queries[:, :, start : start + 7], part)
    (shown,) = moments.latest((500,))
    for head in range(2):
        counted = queries[0, head, 4:].double()
        torch.testing.assert_close(shown.mean[head].double(), counted.mean(0), atol=1e-4, rtol=1e-6)
        covariance = torch.cov(counted.T, correction=0)
        torch.testing.assert_close(shown.covariance[head].double(), covariance, atol=1e-3, rtol=1e-4)


def step_of(positions: Tensor) -> Any:
    from vestige.cache.forward_pass import ForwardPass

    return ForwardPass(1, positions, (0,), padded=False, even=True)


def test_long_texts_in_one_piece_are_counted_in_blocks(monkeypatch):
    model = tiny("llama")
    ids, found = random_ids(model, 1, 50), []
    for block in (1024, 8):
        monkeypatch.setattr("vestige.cache.observers._BLOCK", block)
        cache = KVCache(model, expected_attention())
        with torch.no_grad(), attach(model):
            prefill(model, ids, cache, chunk=50)
        found.append(moments_of(cache))
    assert_same_moments(*found)


def test_a_left_padded_batch_row_has_the_moments_it_has_alone():
    model = tiny("llama")
    ids, mask = left_padded(model, [30, 19, 3])
    cache, alone = KVCache(model, expected_attention()), []
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, chunk=8, attention_mask=mask)
        prefill(model, ids[:, :6], cache)
        for b, length in enumerate((30, 19, 3)):
            single = KVCache(model, expected_attention())
            prefill(model, ids[b : b + 1, 30 - length :], single)
            prefill(model, ids[b : b + 1, :6], single)
            alone.append([shown[0] for shown in moments_of(single)])
    assert_same_moments(moments_of(cache), list(zip(*alone, strict=True)))


def test_nothing_is_counted_of_the_first_four_tokens():
    model = tiny("llama")
    cache = KVCache(model, expected_attention())
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 4), cache)
        assert all(not shown.mean.any() and not shown.covariance.any() for (shown,) in moments_of(cache))
        prefill(model, random_ids(model, 1, 1), cache)
        assert all(shown.mean.any() and not shown.covariance.any() for (shown,) in moments_of(cache))


def test_a_fork_counts_on_its_own_and_a_row_selection_takes_its_moments_along():
    model = tiny("llama")
    ids = random_ids(model, 3, 20)
    cache = KVCache(model, expected_attention())
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache)
        before = moments_of(cache)
        fork = cache.fork()
        prefill(model, ids, fork)
        assert_same_moments(moments_of(cache), before, 0)
        fork = cache.fork()
        fork.batch_select_indices(torch.tensor([2, 0]))
    assert_same_moments(moments_of(fork), [(shown[2], shown[0]) for shown in before], 0)


def test_saving_keeps_moments_and_counting_goes_on_from_them(tmp_path):
    model = tiny("llama")
    ids = random_ids(model, 2, 40)
    cache = KVCache(model, expected_attention(budget=Budget.tokens(12)))
    with torch.no_grad(), attach(model):
        prefill(model, ids[:, :25], cache)
        cache.save(tmp_path / "saved")
        loaded = KVCache.load(tmp_path / "saved", model)
        assert_same_moments(moments_of(loaded), moments_of(cache), 0)
        for one in (cache, loaded):
            prefill(model, ids[:, 25:], one)
    assert_same_moments(moments_of(loaded), moments_of(cache), 0)


def test_one_reading_serves_a_fork_that_changes_to_expected_attention_if_it_was_announced():
    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    wanted = expected_attention(budget=Budget.tokens(12))
    cache = KVCache(model, policies.Full(), observers=[wanted])
    plain, own = KVCache(model, policies.Full()), KVCache(model, wanted)
    with torch.no_grad(), attach(model):
        for one in (cache, plain, own):
            prefill(model, ids, one)
        fork = cache.fork(wanted)
        fork.settle()
        assert [layer.positions(0).tolist() for layer in fork.evictable] == [
            layer.positions(0).tolist() for layer in own.evictable
        ]
        assert not cache.fork(policies.KNorm(budget=OPEN)).evictable[0].rings
        with pytest.raises(PolicyError, match=r"needs query_moments \(1\), rope, this cache recorded nothing"):
            plain.fork(wanted)


def test_moments_count_as_bytes_that_no_eviction_frees():
    model = tiny("llama")
    cache = KVCache(model, expected_attention())
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 2, 20), cache)
    layer = cache.evictable[0]
    assert layer.fixed_bytes == 2 * 4 * (16 + 2) * 16 * 4  # batch, heads, scatter and mean and count, float32
    assert cache.report().kv_bytes == sum(one.nbytes for one in cache.evictable)
    assert layer.nbytes == layer.fixed_bytes + sum(column.nbytes for column in layer.columns.values())


def test_a_crop_takes_no_queries_back_and_what_is_read_aside_is_not_counted():
    model = tiny("llama")
    ids = random_ids(model, 1, 20)
    cache = KVCache(model, expected_attention())
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache)
        before = moments_of(cache)
        replay(model, ids, cache, lambda glance: None)
        cache.crop(-6)
    assert_same_moments(moments_of(cache), before, 0)


# Expected attention's score.


def turned(vector: list[float], position: int, theta: float = 10_000.0) -> list[float]:
    """Return a vector turned as llama does: coordinate i with coordinate i + d/2, by an angle of its own."""
    half, result = len(vector) // 2, list(vector)
    for i in range(half):
        angle = position * theta ** (-i / half)
        result[i] = vector[i] * math.cos(angle) - vector[i + half] * math.sin(angle)
        result[i + half] = vector[i + half] * math.cos(angle) + vector[i] * math.sin(angle)
    return result


def naive_expected_attention(seen: Any, sink: int, future: int, epsilon: float) -> list[float]:
    """Return scores by loops over pairs and heads, in Python floats."""
    scores = []
    for row in range(len(seen.cu_seqlens) - 1):
        b, kv_head = divmod(row, seen.kv_heads)
        pairs = range(*seen.cu_seqlens[row : row + 2])
        mean, covariance = (x.double().tolist() for x in seen.query_moments[b])
        group, size = len(mean) // seen.kv_heads, len(mean[0])
        unit = [[float(i == j) for j in range(size)] for i in range(size)]
        spans = [[turned(e, p) for e in unit] for p in range(seen.seen[b], seen.seen[b] + future)]
        average = [[sum(span[i][j] for span in spans) / future for i in range(size)] for j in range(size)]  # R e_i
        found = {pair: 0.0 for pair in pairs}
        for head in range(kv_head * group, (kv_head + 1) * group):
            logits = {}
            for pair in pairs:
                if seen.positions[pair] < sink:
                    continue
                key = seen.keys[pair].double().tolist()
                back = [sum(key[j] * average[j][i] for j in range(size)) for i in range(size)]  # R^T k
                s = seen.attention.scaling
                x = s * sum(m * k for m, k in zip(mean[head], back, strict=True))
                x += (
                    s
                    * s
                    / 2
                    * sum(back[i] * covariance[head][i][j] * back[j] for i in range(size) for j in range(size))
                )
                cap = seen.attention.softcap
                logits[pair] = x if cap is None else cap * math.tanh(x / cap)
            total = sum(map(math.exp, logits.values()))
            total += 0 if seen.attention.sinks is None else math.exp(seen.attention.sinks[head])
            for pair, x in logits.items():
                found[pair] += math.exp(x) / total / group
        for pair in pairs:
            norm = math.hypot(*seen.values[pair].double().tolist())
            scores.append(0.0 if seen.positions[pair] < sink else (found[pair] + epsilon) * norm)
    return scores


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("sink", "future", "epsilon"), [(0, 1, 0.0), (2, 5, 0.25), (4, 9, 0.0)])
def test_expected_attention_equals_the_naive_one(extra, sink, future, epsilon):
    rope = check(tiny("llama", head_dim=8)).rope()
    seen = dataclasses.replace(random_observation(1, **EXTRAS[extra]), rope=rope, layer_idx=1)
    scores = made("expected_attention", sink=sink, future=future, epsilon=epsilon).score(seen)
    expected = naive_expected_attention(seen, sink, future, epsilon)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_the_expectation_is_that_of_sampled_queries():
    """With one position ahead, expected weights are the mean of exp(q.k) over queries drawn from the moments."""
    rope = check(tiny("llama", head_dim=8)).rope()
    seen = random_observation(2, seen=(9,), kv_heads=1, queries_per_kv=1)
    seen = dataclasses.replace(seen, rope=rope, layer_idx=0, attention=AttentionScale(0.3))
    mean, covariance = (x[0] for x in seen.query_moments[0])
    drawn = torch.randn(400_000, 8, generator=torch.Generator().manual_seed(0)) @ torch.linalg.cholesky(covariance).T
    queries = rope.rotate(drawn + mean, torch.full((400_000,), 9), 0)
    weights = (queries @ seen.keys.T * 0.3).exp().mean(0)
    expected = weights / weights.sum() * seen.values.norm(dim=-1)
    scores = made("expected_attention", sink=0, future=1).score(seen)
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=2e-2)


def test_expected_attention_of_a_short_text_is_finite():
    model = tiny("llama")
    cache = KVCache(model, expected_attention(budget=Budget.tokens(3), sink=0, window=1))
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 4), cache)
    assert cache.held == 3 * 6


@pytest.mark.parametrize("options", [{"future": 0}, {"epsilon": -0.1}, {"epsilon": math.nan}])
def test_expected_attention_refuses_bad_options(options):
    name, value = next(iter(options.items()))
    with pytest.raises(PolicyError, match=rf"future must be at least 1 .* got .*{name}={value}"):
        expected_attention(**options)


# Compactor: attention within chunks.


def naive_chunk_attention(queries: Tensor, keys: Tensor, positions: list[int], chunk: int) -> list[float]:
    """Return what each token gets: the queries of its chunk, of all heads of the group, looking both ways."""
    got = []
    for j, at in enumerate(positions):
        chunk_mates = [i for i, p in enumerate(positions) if p // chunk == at // chunk and p >= 4]
        if at < 4 or len(positions) == 1:
            got.append(1.0)
            continue
        total = 0.0
        for head in queries.double():
            for i in chunk_mates:
                weights = {m: math.exp(float(head[i] @ keys[m].double())) for m in chunk_mates}
                total += weights[j] / sum(weights.values())
        got.append(total / len(queries))
    return got


def glance_at(at: list[int], before: int = 0, seed: int = 0) -> RowView:
    """Return a row that holds pairs of ``before`` earlier tokens (each third) and those of new tokens."""
    generator = torch.Generator().manual_seed(seed)
    positions = [*range(0, before, 3), *at]
    return RowView(
        layer_idx=0,
        kv_head=0,
        queries=torch.randn(3, len(at), 8, generator=generator),
        at=torch.tensor(at),
        attention=AttentionScale(0.5, 1.0, torch.ones(3)),  # neither scale nor softcap nor sinks matter
        positions=torch.tensor(positions, dtype=torch.int32),
        keys=torch.randn(len(positions), 8, generator=generator),
        values=torch.randn(len(positions), 8, generator=generator),
        annotations={"chunk_attention": torch.ones(len(positions)).half()},
    )


@pytest.mark.parametrize("chunk", [1, 5, 8, 256])
@pytest.mark.parametrize(("before", "new"), [(0, 3), (0, 12), (0, 24), (13, 1), (13, 2), (13, 20), (16, 16)])
def test_chunk_attention_equals_the_naive_one(chunk, before, new):
    glance = glance_at(list(range(before, before + new)), before)
    compactor(chunk=chunk).watch(glance)
    got = glance.annotations["chunk_attention"]
    expected = naive_chunk_attention(glance.queries, glance.keys[-new:], glance.at.tolist(), chunk)
    torch.testing.assert_close(got[-new:].float(), torch.tensor(expected), atol=2e-3, rtol=2e-3)
    assert (got[:-new] == 1).all(), "pairs of earlier forwards keep what they have"


def test_pads_in_the_row_take_no_part_in_chunk_attention():
    glance = glance_at(list(range(4, 12)))
    positions = torch.cat([torch.tensor([-1, -1, -1], dtype=torch.int32), glance.positions])
    grown = {name: torch.cat([torch.full((3, 8), 9.0), getattr(glance, name)]) for name in ("keys", "values")}
    side = {"chunk_attention": torch.ones(len(positions)).half()}
    padded = dataclasses.replace(glance, positions=positions, annotations=side, **grown)
    for one in (glance, padded):
        compactor().watch(one)
    assert torch.equal(side["chunk_attention"][3:], glance.annotations["chunk_attention"])
    assert (side["chunk_attention"][:3] == 1).all()


def test_the_mean_of_a_chunk_is_1_what_a_token_alone_gets():
    glance = glance_at(list(range(16, 32)), 16)
    compactor(chunk=8).watch(glance)
    for part in (slice(-16, -8), slice(-8, None)):
        assert glance.annotations["chunk_attention"][part].float().mean() == pytest.approx(1, abs=1e-3)
    keys = torch.ones(2, 3, 1, 4)
    written = compactor().annotate(NewPairs(layer_idx=0, hidden=None, keys=keys, values=keys))
    assert torch.equal(written["chunk_attention"], torch.ones(2, 3, 1).half())


def test_pieces_that_are_whole_chunks_and_batches_with_pads_are_attended_to_as_one_text_alone():
    model, chunk = tiny("llama"), 8
    ids, mask = left_padded(model, [32, 21])
    found = []
    with torch.no_grad(), attach(model):
        for pieces, rows in ((32, slice(None)), (8, slice(0, 1)), (40, slice(1, 2))):
            cache = KVCache(model, compactor(chunk=chunk))
            length = 21 if rows.start == 1 else 32
            prefill(model, ids[rows, 32 - length :], cache, chunk=pieces, attention_mask=mask[rows, 32 - length :])
            for i in range(2):
                forward(model, ids[rows, i + 15 : i + 16], cache)
            found.append([layer.view("chunk_attention") for layer in cache.evictable])
    for together, pieces, short in zip(*found, strict=True):
        torch.testing.assert_close(together[:1], pieces, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(together[1:, :, 11:], short, atol=2e-3, rtol=2e-3)
        assert (together[..., -2:] == 1).all(), "generated tokens are alone"
        assert not (together[..., 11:30] == 1).all()


# Compactor: leverage and the blend.


def z(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))
    return [(x - mean) / deviation for x in values]


def naive_compactor(seen: Any, sketch: Any, weight: list[float]) -> list[float]:
    """Return scores by loops; ``sketch(kv_head)`` is the random matrix; keys are those before RoPE."""
    leverage, attended = {}, {}
    for row in range(len(seen.cu_seqlens) - 1):
        pairs = range(*seen.cu_seqlens[row : row + 2])
        counted = [i for i in pairs if seen.positions[i] >= 4]
        if not counted:
            continue
        back = torch.tensor(
            [turned(seen.keys[i].double().tolist(), -int(seen.positions[i])) for i in counted], dtype=torch.float64
        )
        x = (back - back.mean(0)) @ sketch(row % seen.kv_heads)
        hat = x @ torch.linalg.pinv(x, rtol=1e-9)
        leverage |= {(row, i): float(hat[n, n]) for n, i in enumerate(counted)}
        worth = [
            float(seen.annotations["chunk_attention"][i]) * math.hypot(*seen.values[i].tolist()) if i in counted else 0
            for i in pairs
        ]
        for i in counted:
            n = i - pairs.start
            attended[row, i] = sum(worth[max(n - 1, 0) : n + 2]) / 3
    scores = [0.0] * len(seen.positions)
    for b in range(len(seen.seen)):
        mine = [key for key in leverage if key[0] // seen.kv_heads == b]
        parts = z([leverage[key] for key in mine]), z([attended[key] for key in mine])
        for (_, i), outlying, wanted in zip(mine, *parts, strict=True):
            scores[i] = weight[b] * outlying + wanted
    return scores


@pytest.mark.parametrize("blending", [None, 0.0, 0.35])
@pytest.mark.parametrize("size", [3, 8, 48])
def test_compactor_equals_the_naive_one(blending, size):
    rope = check(tiny("llama", head_dim=8)).rope()
    seen = random_observation(3, seen=(60, 40))
    seen = dataclasses.replace(seen, rope=rope, layer_idx=1, pair_limits=(20, 50))
    policy = made("compactor", blending=blending, sketch=size, seed=5)

    def sketch(kv_head: int) -> Tensor:
        drawn = policy._sketch(seen.keys, 1, kv_head)
        assert (drawn is None) == (size >= 8), "keys that have no more dimensions than the sketch are taken as they are"
        return torch.eye(8, dtype=torch.float64) if drawn is None else drawn.double()

    weight = [1 - 20 / 60, 0] if blending is None else [blending] * 2  # of 40 tokens 50 may stay
    expected = naive_compactor(seen, sketch, weight)
    torch.testing.assert_close(policy.score(seen), torch.tensor(expected), atol=0.02, rtol=0.02)  # for the ridge


def test_a_key_unlike_the_others_has_the_highest_leverage():
    seen = random_observation(4, seen=(80,), kv_heads=1, queries_per_kv=1)
    keys = seen.keys.clone()
    keys[:, 5] *= 0.1
    keys[30, 5] = 4.0
    seen = dataclasses.replace(seen, keys=keys, annotations={"chunk_attention": torch.ones(len(keys)).half()})
    assert made("compactor", blending=100.0).score(seen).argmax() == 30


def test_sketches_differ_by_seed_layer_and_head_and_by_nothing_else():
    keys = torch.zeros(1, 64)
    drawn = [
        made("compactor", seed=seed)._sketch(keys, layer, head)
        for seed in (0, 1, 2**64)
        for layer in (0, 1)
        for head in (0, 1)
    ]
    assert drawn[0].shape == (64, 48)
    assert all(not torch.equal(a, b) for n, a in enumerate(drawn) for b in drawn[:n])
    assert torch.equal(drawn[3], made("compactor", seed=0, blending=0.1)._sketch(keys, 1, 1))
    assert (drawn[0] @ drawn[0].T).diagonal().mean() == pytest.approx(1, abs=0.2), "lengths are kept on average"


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_leverage_does_not_depend_on_the_size_of_keys_and_equal_keys_break_nothing(scale):
    seen = random_observation(5, seen=(40, 3))
    scores = made("compactor", blending=1.0).score(dataclasses.replace(seen, keys=seen.keys * scale))
    assert scores.isfinite().all()
    if scale == 1e4:
        torch.testing.assert_close(scores, made("compactor", blending=1.0).score(seen), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sketch": 0}, r"sketch and chunk must be at least 1, got sketch=0, chunk=256"),
        ({"chunk": 0}, r"sketch and chunk must be at least 1, got sketch=48, chunk=0"),
        ({"blending": -1.0}, r"blending must be None or a number that is not negative, got -1.0"),
    ],
)
def test_compactor_refuses_bad_options(options, told):
    with pytest.raises(PolicyError, match=told):
        compactor(**options)


def test_two_compactors_of_unequal_chunks_cannot_share_a_reading_but_others_can():
    model = tiny("llama")
    KVCache(model, compactor(), observers=[compactor(blending=0.5, seed=3)])
    with pytest.raises(PolicyError, match="'chunk_attention'"):
        KVCache(model, compactor(), observers=[compactor(chunk=128)])


def test_an_input_that_is_refused_leaves_no_moments():
    model = tiny("llama")
    cache = KVCache(model, expected_attention())
    with attach(model), pytest.raises(InputError):
        prefill(model, random_ids(model, 1, 600), cache)
    assert not cache.evictable[0].rings
