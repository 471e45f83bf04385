"""Every policy against golden numbers and a naive oracle; what all of them promise."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.conftest import ROOMY, made, random_indexer
from vestige import Observation, Phase, policies
from vestige.cache.query_records import Moments
from vestige.kernels import AttentionScale
from vestige.models.rope import Rope, Rotation
from vestige.nn.indexer import Indexer
from vestige.policies import POLICIES
from vestige.testing import tiny

NAMES = sorted(POLICIES)
ANNOTATIONS: dict[str, Callable[[torch.Generator, int, int], torch.Tensor]] = {
    "asked_for": lambda generator, held, group: torch.randn(held, 2, generator=generator).half(),
    "asked": lambda generator, held, group: torch.rand(held, generator=generator),
    "absolute_output_norms": lambda generator, held, group: torch.rand(held, generator=generator),
    "output_norms": lambda generator, held, group: torch.rand(held, group, generator=generator).half(),
    "chunk_attention": lambda generator, held, group: torch.rand(held, generator=generator).half(),
    "log_beta": lambda generator, held, group: -torch.rand(held, generator=generator),
    "received": lambda generator, held, group: torch.rand(held, generator=generator),
}
"""Random side arrays by name, of so many pairs and queries per KV head."""
STILL = Rope(
    defaultdict(
        lambda: Rotation(lambda like, at: (like.new_ones(*at.shape, 2), like.new_zeros(*at.shape, 2)), lambda x, *_: x)
    )
)
"""No layer turns its keys."""
MODEL = tiny("llama", num_hidden_layers=4)
LN = {n: math.log(n) for n in (1, 2, 3, 4, 8)}


def random_moments(generator: torch.Generator, batch: int, heads: int, head_dim: int) -> tuple[Moments, ...]:
    """Return the mean and covariance of some random queries of each batch row."""
    queries = torch.randn(batch, 20, heads, head_dim, generator=generator)
    covariances = [torch.stack([torch.cov(row[:, h].T, correction=0) for h in range(heads)]) for row in queries]
    return tuple(Moments(row.mean(0), c.view(heads, head_dim, -1)) for row, c in zip(queries, covariances, strict=True))


def packed(rows: list[dict[int, list[float]]], seen: list[int], **fields: Any) -> Observation:
    """Return an observation of rows that map a position to its key; values are ones."""
    keys = [key for row in rows for key in row.values()]
    positions = [position for row in rows for position in row]
    ends = [sum(map(len, rows[:n])) for n in range(len(rows) + 1)]
    flat = torch.tensor(keys, dtype=torch.float32) if keys else torch.empty(0, 2)
    kv_heads, generator = len(rows) // len(seen), torch.Generator().manual_seed(0)
    group = len(fields["queries"][0]) // kv_heads if "queries" in fields else 1
    side = {name: make(generator, len(keys), group) for name, make in ANNOTATIONS.items()}
    defaults = {"layer_idx": 0, "phase": Phase.PREFILL, "kv_heads": kv_heads, "annotations": side}
    defaults["query_moments"] = random_moments(generator, len(seen), group * kv_heads, flat.shape[1])
    defaults |= {"pair_limits": (ROOMY.amount,) * len(seen), "rope": STILL, "model": MODEL}
    return Observation(
        **defaults | fields,
        seen=tuple(seen),
        cu_seqlens=tuple(ends),
        positions=torch.tensor(positions, dtype=torch.int32),
        keys=flat,
        values=torch.ones(len(keys), 3),
    )


def random_observation(
    seed: int = 0,
    *,
    seen: tuple[int, ...] = (14, 9),
    kv_heads: int = 2,
    queries_per_kv: int = 2,
    observed: int = 4,
    softcap: float | None = None,
    sinks: bool = False,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 8,
) -> Observation:
    """Return random rows of unequal lengths, all of which hold token 0; the second row holds nothing."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    for length in seen:
        for _ in range(kv_heads):
            alive = torch.rand(length, generator=generator) < 0.7
            rows.append([0, *(1 + alive[1:].nonzero()[:, 0]).tolist()])
    if len(rows) > 1:
        rows[1] = []
    held, heads = sum(map(len, rows)), kv_heads * queries_per_kv
    queries = [torch.randn(heads, min(observed, n), head_dim, generator=generator).to(dtype) for n in seen]
    return Observation(
        layer_idx=3,
        phase=Phase.DECODE,
        kv_heads=kv_heads,
        seen=seen,
        pair_limits=(4,) * len(seen),
        cu_seqlens=tuple(sum(map(len, rows[:n])) for n in range(len(rows) + 1)),
        positions=torch.tensor([position for row in rows for position in row], dtype=torch.int32),
        keys=torch.randn(held, head_dim, generator=generator).to(dtype),
        values=torch.randn(held, head_dim, generator=generator).to(dtype),
        queries=tuple(queries),
        attention=AttentionScale(0.5, softcap, torch.randn(heads, generator=generator) if sinks else None),
        annotations={name: make(generator, held, queries_per_kv) for name, make in ANNOTATIONS.items()},
        query_moments=random_moments(generator, len(seen), heads, head_dim),
        rope=STILL,
        model=MODEL,
    )


def batch_row(obs: Observation, b: int) -> Observation:
    """Return one batch row of an observation, alone."""
    rows = slice(b * obs.kv_heads, (b + 1) * obs.kv_heads + 1)
    ends = obs.cu_seqlens[rows]
    pairs = slice(ends[0], ends[-1])
    return dataclasses.replace(
        obs,
        seen=obs.seen[b : b + 1],
        cu_seqlens=tuple(end - ends[0] for end in ends),
        positions=obs.positions[pairs],
        keys=obs.keys[pairs],
        values=obs.values[pairs],
        queries=obs.queries[b : b + 1],
        query_moments=obs.query_moments[b : b + 1],
        pair_limits=obs.pair_limits[b : b + 1],
        annotations={name: x[pairs] for name, x in obs.annotations.items()},
    )


# Golden numbers, by hand.

KEYS = [{0: [3.0, 4.0], 1: [-3.0, 4.0], 4: [0.0, 2.0]}, {0: [1.0, 0.0], 2: [0.0, 1.0]}]
"""Two KV heads: the keys of tokens 0, 1, 4 and of tokens 0, 2."""

READ = [
    {0: [LN[1], LN[2]], 1: [LN[2], LN[2]], 2: [LN[4], LN[2]], 3: [LN[1], LN[2]], 5: [LN[8], LN[8]]},
    {0: [LN[1], LN[1]], 2: [LN[1], LN[3]], 5: [LN[2], LN[4]]},
]
"""Keys whose products with the unit queries below are logarithms of small integers: weights are ratios of these."""

UNIT = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[:, None].expand(2, 2, 2)
"""Each query head reads one coordinate, at both observed queries: those of tokens 4 and 5."""


def by_keys() -> Observation:
    return packed(KEYS, seen=[6])


def by_queries(rows: int) -> Observation:
    return packed(READ[:rows], seen=[6], queries=(UNIT.repeat(rows, 1, 1),), attention=AttentionScale(1.0))


def scaled() -> Indexer:
    """Return an indexer that holds the outputs of the second KV head of layer 0 to be e times those of the first."""
    indexer = random_indexer(MODEL)
    indexer.log_scales[0] = torch.tensor([0.0, 1.0])
    return indexer


GOLDEN = {
    # Nobody asked for token 1 of late, but once twice as much as for its neighbours now; the second head asks alike.
    # Shares are of all but the sink: [2 4 2]/6, [3 3]/3.
    "indexmem": (
        lambda: dataclasses.replace(
            by_keys(),
            annotations={
                "asked_for": torch.tensor(
                    [[LN[2], 9.0], [-math.inf, LN[4]], [LN[2], LN[8]], [LN[3], -math.inf], [LN[3], 0.0]]
                )
            },
        ),
        {"indexer": scaled(), "sink": 1},
        [-LN[3], LN[2] - LN[3], -LN[3], 1, 1],
    ),
    # A pair that no replay looked at is marked with -1.
    "kvzip": (
        lambda: dataclasses.replace(by_keys(), annotations={"asked": torch.tensor([-1.0, 0.25, 0.0, 1.0, 0.5])}),
        {},
        [0, 0.25, 0, 1, 0.5],
    ),
    # The next query is 6, 5 and 2 tokens from the pairs of the first head, 6 and 4 from those of the second.
    "retention": (
        lambda: dataclasses.replace(
            by_keys(), annotations={"log_beta": torch.tensor([-0.5, -1.0, -0.25, -0.125, -2.0])}
        ),
        {},
        [-3, -5, -0.5, -0.75, -8],
    ),
    # Tokens 0, 1 and 4 are 0, 1/2 and 1/2 off, by the first and the last 2; in the second head token 2 is 3/2 off.
    "duo_attention": (by_keys, {"first": 2, "recent": 2, "retrieval": ((1.0, 0.0),)}, [2, 4 / 3, 4 / 3, 1, 2 / 5]),
    # As snapkv below without pooling, [9 12 18 9 0]/64; the second head reads tokens 0, 2, 5 as [1 1]/2 and [1 3]/4,
    # then as [1 1 2]/4 and [1 3 4]/8: [18 30 0]/64. A token is worth its mean over the KV heads that hold it.
    "xkv": (
        lambda: by_queries(2),
        {"observed": 2, "kernel": 1},
        [x / 128 for x in (27, 24, 48, 18, 0, 27, 48, 0)],
    ),
    # One head reads keys (x, y) with mean (1, 0) and variance 2 of y: exp(x + y^2) is 2 and 1 for (LN2, 0) and (0, 0),
    # and e for (0, 1). Token 0 is a sink; values have norm sqrt 3.
    "expected_attention": (
        lambda: packed(
            [{0: [9.0, 9.0], 1: [LN[2], 0.0], 2: [0.0, 0.0], 4: [0.0, 1.0]}],
            seen=[5],
            attention=AttentionScale(1.0),
            query_moments=(Moments(torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 0.0], [0.0, 2.0]]])),),
        ),
        {"sink": 1, "epsilon": 0.5},
        [0, *(3**0.5 * (weight / (3 + math.e) + 0.5) for weight in (2, 1, math.e))],
    ),
    # Tokens 0 to 3 take no part. Keys 4, 5, 6 are 1, 1, -2 off their mean in x alone: leverages 1/6, 1/6, 4/6, z-scores
    # -1, -1, 2 over sqrt 2. Attention 3, 0, 3 times the norm sqrt 3, pooled with neighbours (3 before them counts 0):
    # 3, 6, 3 over 3, z-scores -1, 2, -1 over sqrt 2. The leverage counts half, as half of the 8 tokens may stay.
    "compactor": (
        lambda: packed(
            [{3: [5.0, 0.0], 4: [1.0, 0.0], 5: [1.0, 0.0], 6: [-2.0, 0.0]}],
            seen=[8],
            pair_limits=(4,),
            annotations={"chunk_attention": torch.tensor([3.0, 3.0, 0.0, 3.0]).half()},
        ),
        {},
        [0, *((0.5 * a + b) / 2**0.5 for a, b in ((-1, -1), (-1, 2), (2, -1)))],
    ),
    "full": (by_keys, {}, [0, 0, 0, 0, 0]),
    "streaming_llm": (by_keys, {}, [0, 1, 4, 0, 2]),
    "knorm": (by_keys, {}, [-5, -5, -2, -1, -1]),
    # Row 0 has the unit keys (.6, .8), (-.6, .8), (0, 1) and so an anchor along (0, 1); row 1 one along (1, 1).
    "keydiff": (by_keys, {}, [-0.8, -0.8, -1, -(0.5**0.5), -(0.5**0.5)]),
    # The top 24 bits of SplitMix64(SplitMix64(head) + position), computed in Python integers.
    "random": (by_keys, {}, [8794306 / 2**24, 11691894 / 2**24, 12988148 / 2**24, 7030588 / 2**24, 16418682 / 2**24]),
    # Token 5, seen last, weighs 8/16 and 8/16, then 2/4 and 4/8; token 0: 1/16 and 2/16, then 1/4 and 1/8; and so on.
    # A token is worth its mean over the KV heads that hold it.
    "tova": (
        lambda: by_queries(2),
        {},
        [9 / 64, 8 / 64, 16 / 64, 6 / 64, 32 / 64, 9 / 64, 16 / 64, 32 / 64],
    ),
    # As snapkv below, but column norms: heads read token 0 with 1/8 and 1/16, and with 2/8 and 2/16, and so on, so that
    # column norms are the weights of the first query times 5**.5 / 2; with norms 1 and 3 their mean is 5**.5 / 4 *
    # [1 + 6, 2 + 6, 4 + 6, 1 + 6] / 8; token 5 counts 0, three slots are pooled.
    "laprox": (
        lambda: dataclasses.replace(by_queries(1), annotations={"output_norms": torch.tensor([[1.0, 3.0]] * 5)}),
        {"observed": 2, "kernel": 3},
        [5**0.5 / 96 * x for x in (15, 25, 25, 17, 7)],
    ),
    # The scores of snapkv below.
    "adakv": (lambda: by_queries(1), {"observed": 2, "kernel": 3}, [x / 64 for x in (7, 13, 13, 9, 3)]),
    "pyramidkv": (lambda: by_queries(1), {"observed": 2, "kernel": 3}, [x / 64 for x in (7, 13, 13, 9, 3)]),
    # The attention of snapkv below; token 5 is window. Of the 4 other places 2 go to the largest, 13 and 13 of
    # 7 + 13 + 13 + 9 = 42; times the norms that is 7, 26, 39, 36 of 108, and 3 * 2 for token 5.
    "criticalkv": (
        lambda: dataclasses.replace(
            by_queries(1),
            pair_limits=(5,),
            annotations={"absolute_output_norms": torch.tensor([1.0, 2.0, 3.0, 4.0, 2.0])},
        ),
        {"observed": 2, "kernel": 3, "sink": 0, "window": 1, "epsilon": 0.0},
        [7 / 108, 2 + 13 / 42, 2 + 13 / 42, 36 / 108, 6 / 108],
    ),
    "h2o": (
        lambda: dataclasses.replace(by_keys(), annotations={"received": torch.tensor([3.0, 1.0, 0.5, 2.0, 4.0])}),
        {},
        [3, 1, 0.5, 2, 4],
    ),
    # Token 0 is a sink; tokens 3 and 4 follow 1 and 2 and reach from 0 to 1 and from 0 to 2, so that 1 is (1, 1) and 2
    # is (1, 0) on their scale: 2 deviates more. Values are all alike.
    "lagkv": (
        lambda: packed([{0: [9.0, 9.0], 1: [1.0, 2.0], 2: [1.0, 0.0], 3: [0.0, 2.0], 4: [1.0, 0.0]}], seen=[5]),
        {"sink": 1, "lag": 2},
        [1, 0, 1 / 2, 1, 1],
    ),
    # The larger product of two heads weighs 2, 2, 4, 8 of 16; of three slots the largest counts. Keys 0, 2 and 3 are
    # alike: links from 0 and 2 to 3 and from 3 to 2 do not count, so 2, 0, 1, 0 of 4 are left. Token 5 is observed.
    "r_kv": (
        lambda: packed(
            [{0: [LN[2], 0.0], 1: [0.0, LN[2]], 2: [LN[4], 0.0], 3: [LN[8], 0.0], 5: [1.0, 1.0]}],
            seen=[6],
            queries=(UNIT,),
            attention=AttentionScale(1.0),
        ),
        {"observed": 2, "kernel": 3},
        [
            *(
                0.1 * weight / 16 - 0.9 * math.exp(mean) / (2 + math.exp(0.5) + math.exp(0.25))
                for weight, mean in ((2, 0.5), (4, 0), (8, 0.25), (8, 0))
            ),
            0,
        ],
    ),
    # Heads read [1 2 4 1]/8 and [2 2 2 2]/8 at token 4, [1 2 4 1 8]/16 and [2 2 2 2 8]/16 at token 5: the mean is
    # [9 12 18 9]/64; token 5 was observed and counts 0. Three slots are pooled, with zeros beyond the ends.
    "snapkv": (
        lambda: by_queries(1),
        {"observed": 2, "kernel": 3},
        [7 / 64, 13 / 64, 13 / 64, 9 / 64, 3 / 64],
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_golden_ones(name):
    assert name in GOLDEN, f"policy {name!r} has no golden scores"
    observation, options, expected = GOLDEN[name]
    scores = made(name, **options).score(observation())
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32))


# Naive oracles: loops over pairs, heads and queries, in Python floats.


def naive_attention(obs: Observation, row: int, observed: int) -> list[list[dict[int, float]]]:
    """Return per query head of a row and per observed query the weight of each position held."""
    b, kv_head = divmod(row, obs.kv_heads)
    start, end = obs.cu_seqlens[row : row + 2]
    heads = obs.queries[b].shape[0] // obs.kv_heads
    found = []
    for head in range(kv_head * heads, (kv_head + 1) * heads):
        per_query = []
        latest = obs.queries[b][head].double()[-observed:]
        for number, query in enumerate(latest):
            at = obs.seen[b] - len(latest) + number
            logits = {}
            for pair in range(start, end):
                if obs.positions[pair] <= at:
                    x = float(query @ obs.keys[pair].double()) * obs.attention.scaling
                    cap = obs.attention.softcap
                    logits[int(obs.positions[pair])] = x if cap is None else cap * math.tanh(x / cap)
            total = sum(map(math.exp, logits.values()))
            total += 0 if obs.attention.sinks is None else math.exp(obs.attention.sinks[head])
            per_query.append({position: math.exp(x) / total for position, x in logits.items()})
        found.append(per_query)
    return found


def rows_of(obs: Observation) -> list[list[int]]:
    """Return the positions that each row holds."""
    return [obs.positions[start:end].tolist() for start, end in pairwise(obs.cu_seqlens)]


def naive_snapkv(obs: Observation, observed: int, kernel: int, causal: bool = False) -> list[float]:
    scores = []
    for row, held in enumerate(rows_of(obs)):
        b = row // obs.kv_heads
        first = obs.seen[b] - min(observed, obs.queries[b].shape[1])
        weights = [query for head in naive_attention(obs, row, observed) for query in head]
        mass = [sum(w.get(p, 0.0) for w in weights) / len(weights) if p < first else 0.0 for p in held]
        for slot in range(len(held)):
            begin = slot - (kernel - 1 if causal else kernel // 2)
            near = [mass[i] for i in range(begin, begin + kernel) if 0 <= i < len(held)]
            scores.append(sum(near) / kernel)
    return scores


def naive_tova(obs: Observation) -> list[float]:
    per_row = []
    for row in range(len(obs.cu_seqlens) - 1):
        heads = naive_attention(obs, row, 1)
        per_row.append({p: sum(head[0][p] for head in heads) / len(heads) for p in rows_of(obs)[row]})
    scores = []
    for row, held in enumerate(rows_of(obs)):
        b = row // obs.kv_heads
        batch = per_row[b * obs.kv_heads : (b + 1) * obs.kv_heads]
        for position in held:
            found = [weights[position] for weights in batch if position in weights]
            scores.append(sum(found) / len(found))
    return scores


def naive_keydiff(obs: Observation) -> list[float]:
    scores = []
    for start, end in pairwise(obs.cu_seqlens):
        units = [unit(key) for key in obs.keys[start:end].double().tolist()]
        anchor = unit([sum(column) for column in zip(*units, strict=True)])
        scores += [-sum(x * y for x, y in zip(key, anchor, strict=True)) for key in units]
    return scores


def unit(vector: list[float]) -> list[float]:
    return [x / math.hypot(*vector) for x in vector]


def naive_random(obs: Observation, seed: int) -> list[float]:
    scores = []
    for row, held in enumerate(rows_of(obs)):
        stream = (seed << 30) + (obs.layer_idx << 10) + row % obs.kv_heads
        scores += [(mix(mix(stream) + position) >> 40) / 2**24 for position in held]
    return scores


def mix(x: int) -> int:
    """SplitMix64's output number x of the stream that begins at 0, in Python integers."""
    mask = 2**64 - 1
    x = (x + 1) * 0x9E3779B97F4A7C15 & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


EXTRAS = {"plain": {}, "softcap": {"softcap": 1.5}, "sinks": {"sinks": True}, "both": {"softcap": 1.5, "sinks": True}}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("observed", "kernel"), [(1, 1), (3, 1), (3, 5), (4, 3), (32, 7)])
def test_snapkv_equals_the_naive_one(observed, kernel, causal, extra):
    obs = random_observation(1, **EXTRAS[extra])
    scores = made("snapkv", observed=observed, kernel=kernel, causal=causal).score(obs)
    torch.testing.assert_close(scores, torch.tensor(naive_snapkv(obs, observed, kernel, causal)))


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("seed", range(3))
def test_tova_equals_the_naive_one(seed, extra):
    obs = random_observation(seed, kv_heads=3, **EXTRAS[extra])
    torch.testing.assert_close(made("tova").score(obs), torch.tensor(naive_tova(obs)))


@pytest.mark.parametrize("seed", range(3))
def test_keydiff_equals_the_naive_one(seed):
    obs = random_observation(seed)
    torch.testing.assert_close(made("keydiff").score(obs), torch.tensor(naive_keydiff(obs)))


@pytest.mark.parametrize("seed", range(3))
def test_knorm_equals_the_naive_one(seed):
    obs = random_observation(seed)
    expected = [-math.hypot(*key) for key in obs.keys.double().tolist()]
    torch.testing.assert_close(made("knorm").score(obs), torch.tensor(expected))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, -1])
def test_random_equals_splitmix64_in_python_integers(seed):
    obs = random_observation(2)
    assert made("random", seed=seed).score(obs).tolist() == naive_random(obs, seed)


# What every policy promises.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_finite_float32_numbers_one_for_each_pair(name, dtype):
    obs = random_observation(dtype=dtype)
    scores = made(name).score(obs)
    assert scores.dtype == torch.float32
    assert scores.shape == obs.positions.shape
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_scoring_changes_nothing_it_was_given(name):
    obs, before = random_observation(sinks=True), random_observation(sinks=True)
    made(name).score(obs)
    for field in ("positions", "keys", "values"):
        assert torch.equal(getattr(obs, field), getattr(before, field)), field
    assert all(torch.equal(now, then) for now, then in zip(obs.queries, before.queries, strict=True))
    assert torch.equal(obs.attention.sinks, before.attention.sinks)


@pytest.mark.parametrize("name", NAMES)
def test_scoring_twice_gives_the_same(name):
    obs, policy = random_observation(), made(name)
    assert torch.equal(policy.score(obs), policy.score(obs))


@pytest.mark.parametrize("name", NAMES)
def test_batch_rows_do_not_touch_each_other(name):
    obs, policy = random_observation(6, seen=(14, 9, 11)), made(name)
    alone = [policy.score(batch_row(obs, b)) for b in range(3)]
    torch.testing.assert_close(policy.score(obs), torch.cat(alone))


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_holds_nothing_has_no_scores(name):
    queries = (torch.ones(2, 3, 2),)
    obs = packed([{}, {}], seen=[8], queries=queries, attention=AttentionScale(1.0))
    assert made(name).score(obs).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_other_rows_do_not_depend_on_a_row_that_holds_nothing(name):
    full_rows = [{0: [1.0, 2.0], 3: [2.0, 0.5]}, {}, {}, {0: [0.0, 1.0], 1: [3.0, 1.0], 4: [1.0, 1.0]}]
    queries = tuple(torch.ones(2, 1, 2) for _ in range(2))
    obs = packed(full_rows, seen=[5, 5], queries=queries, attention=AttentionScale(1.0))
    scores = made(name, **({"observed": 1} if name == "snapkv" else {})).score(obs)
    assert len(scores) == 5
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_cannot_be_changed_and_takes_no_positions(name):
    policy = made(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.sink = 9
    with pytest.raises(TypeError):
        type(policy)(ROOMY)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_names_its_source(name):
    assert "Source:" in policies.resolve(name).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_policies_with_equal_fields_are_equal(name):
    assert made(name) == made(name)
    assert made(name) != made(name, every=7)
