"""Every memory against numbers by hand and naive oracles; what all of them promise."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vestige import PolicyError, Span, memory
from vestige.kernels import AttentionScale
from vestige.kernels.merge import AdditiveOutput, PartialAttention, merge
from vestige.memory import MEMORIES, Centroids, Linear, Moments, Slots
from vestige.memory.base import AbsorbedRanges, EvictedPairs, LayerMemory, MemoryQuery, log_count
from vestige.memory.storage import check_dtype
from vestige.nn.latent_memory import Latent, LatentConfig, kind_of

ESTIMATES = sorted(set(MEMORIES) - {"none", "linear"})
"""What estimates attention over the evicted, well or badly."""
TRAINED = {f"{kind}{decays}": (kind, bool(decays)) for kind in ("linear", "slots") for decays in ("", ", decays")}
NAMES = [*ESTIMATES, *(name for name in TRAINED if name not in ESTIMATES)]
HEAD_DIM, VALUE_DIM = 6, 4
PLAIN = AttentionScale(0.4)
EXACTLY = {"dtype": "float32"}


def random_weights(kind: str = "linear", head_dim: int = HEAD_DIM, width: int = 5, **shape) -> Latent:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        latent = Latent(LatentConfig(kind=kind_of(kind), layers=(0,), head_dims=(head_dim,), width=width, **shape))
        return latent.requires_grad_(False)


def made(name: str, **options):
    if name in TRAINED:
        kind, decays = TRAINED[name]
        return (Slots if kind == "slots" else Linear)(latent=random_weights(kind, decays=decays), **options)
    cls = memory.resolve(name)
    assert cls is not None
    return cls(**options)


def evicted(*rows: tuple[list[list[float]], list[list[float]]]) -> EvictedPairs:
    """Return pairs of rows given as (keys, values)."""
    sizes = (len(rows[0][0][0]), len(rows[0][1][0]))
    return gone(
        [torch.tensor(k).view(-1, sizes[0]) for k, _ in rows], [torch.tensor(v).view(-1, sizes[1]) for _, v in rows]
    )


def gone(keys: list[Tensor], values: list[Tensor]) -> EvictedPairs:
    """Return pairs of rows; their slots lie in one buffer after another's."""
    columns = {"keys": torch.cat(keys), "values": torch.cat(values)}
    columns["positions"] = torch.cat([torch.arange(len(k), dtype=torch.int32) for k in keys])
    return EvictedPairs.of(0, columns, torch.arange(len(columns["keys"])), [len(k) for k in keys])


def random_rows(lengths: list[int], seed: int = 0, spread: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Return keys and values of rows, far from zero mean."""
    generator = torch.Generator().manual_seed(seed)
    keys = [spread * torch.randn(n, HEAD_DIM, generator=generator) + 1 for n in lengths]
    values = [
        torch.randn(n, VALUE_DIM, generator=generator) + k[:, :VALUE_DIM] - 2
        for n, k in zip(lengths, keys, strict=True)
    ]
    return keys, values


def queries(rows: int, number: int = 5, seed: int = 9) -> Tensor:
    return torch.randn(rows, number, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def empty(one, rows: int):
    return one.empty(rows, HEAD_DIM, VALUE_DIM, "cpu")


def ask(one, state, given: Tensor, scale: AttentionScale = PLAIN) -> PartialAttention | AdditiveOutput:
    return one.recall(state, MemoryQuery(layer_idx=0, queries=given, scale=scale))


def in_pieces(one, keys: list[Tensor], values: list[Tensor], seed: int = 0):
    """Return the state after the rows came in random pieces, of which some are empty."""
    state, generator = empty(one, len(keys)), torch.Generator().manual_seed(seed)
    cuts = [sorted(torch.randint(len(k) + 1, (6,), generator=generator).tolist()) for k in keys]
    cuts = [[0, *cut, len(k)] for cut, k in zip(cuts, keys, strict=True)]
    for edges in zip(*map(pairwise, cuts), strict=True):
        pieces = [[x[a:b] for x, (a, b) in zip(xs, edges, strict=True)] for xs in (keys, values)]
        if any(len(k) for k in pieces[0]):
            state = one.absorb(state, gone(*pieces))
    return state


def attention(given: Tensor, keys: Tensor, values: Tensor, scale: AttentionScale = PLAIN) -> PartialAttention:
    """Return attention over one row's pairs in float64."""
    logits = scale.capped(given.double() @ keys.double().T * scale.scaling)
    return PartialAttention(logits.softmax(-1) @ values.double(), logits.logsumexp(-1))


def close(
    got: PartialAttention | AdditiveOutput, expected: PartialAttention | AdditiveOutput, tolerance: float = 1e-5
) -> None:
    assert vars(got).keys() == vars(expected).keys()
    for one, other in zip(vars(got).values(), vars(expected).values(), strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=tolerance, rtol=tolerance)


def part(found: PartialAttention | AdditiveOutput, at) -> PartialAttention | AdditiveOutput:
    """Return what some rows recall."""
    return type(found)(*(x[at] for x in vars(found).values()))


def joined(kept: PartialAttention, found: PartialAttention | AdditiveOutput) -> Tensor:
    return kept.output + found.output if isinstance(found, AdditiveOutput) else merge(kept, found)


# Pairs that go.


def test_evicted_pairs_are_padded_with_zeros_and_nothing_leaks_from_other_slots():
    columns = {
        "keys": torch.tensor([[math.nan], [1.0], [2.0], [3.0]]),
        "values": torch.tensor([[math.nan], [5.0], [6.0], [7.0]]),
        "positions": torch.tensor([0, 11, 12, 13], dtype=torch.int32),
    }
    one = EvictedPairs.of(3, columns, torch.tensor([3, 1, 2]), [1, 0, 2])
    assert one.layer_idx == 3 and one.counts.tolist() == [1, 0, 2]
    assert one.keys[..., 0].tolist() == [[3, 0], [0, 0], [1, 2]]
    assert one.values[..., 0].tolist() == [[7, 0], [0, 0], [5, 6]]
    assert one.positions.tolist() == [[13, -1], [-1, -1], [11, 12]]
    assert one.valid.tolist() == [[True, False], [False, False], [True, True]]
    assert one.nbytes == (6 + 6) * 4 + 6 * 4


# Putting two parts together.


def test_two_exact_parts_make_the_whole():
    keys, values = random_rows([20])
    given = queries(1)[0].double()
    whole = attention(given, keys[0], values[0])
    one, other = (attention(given, keys[0][part], values[0][part]) for part in (slice(0, 7), slice(7, 20)))
    torch.testing.assert_close(merge(one, other), whole.output, atol=1e-12, rtol=0)
    torch.testing.assert_close(merge(other, one), whole.output, atol=1e-12, rtol=0)


@pytest.mark.parametrize("lse", [-math.inf, -1e30, -1e4])
def test_a_part_that_weighs_nothing_changes_no_bit(lse):
    kept = PartialAttention(torch.randn(3, 2), torch.tensor([-50.0, 0.0, 50.0]))
    assert torch.equal(merge(kept, PartialAttention(torch.full((3, 2), 7.0), torch.full((3,), lse))), kept.output)


def test_a_part_that_outweighs_the_other_overflows_nothing():
    kept = PartialAttention(torch.ones(1, 2), torch.tensor([-1e4]))
    assert merge(kept, PartialAttention(torch.full((1, 2), 7.0), torch.tensor([1e4]))).tolist() == [[7, 7]]


# What every memory promises.


@pytest.mark.parametrize("name", ESTIMATES)
def test_one_pair_per_row_is_remembered_exactly(name):
    one = made(name, **EXACTLY)
    keys, values = random_rows([1, 1, 1])
    state = one.absorb(empty(one, 3), gone(keys, values))
    for scale in (PLAIN, AttentionScale(0.4, 1.5)):
        got = ask(one, state, given := queries(3), scale)
        for r in range(3):
            close(part(got, r), attention(given[r], keys[r], values[r], scale))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_absorbed_nothing_weighs_nothing_and_has_finite_gradients(name):
    one = made(name)
    keys, values = random_rows([9, 0])
    state = one.absorb(empty(one, 2), gone(keys, values))
    given = queries(2).requires_grad_()
    kept = PartialAttention(torch.randn(2, 5, VALUE_DIM), torch.randn(2, 5))
    for now in (empty(one, 2), state):
        out = joined(kept, ask(one, now, given))
        assert torch.equal(out[1], kept.output[1])
        (gradient,) = torch.autograd.grad(out.sum(), given, allow_unused=True)
        assert gradient.isfinite().all() and not gradient[1].any()
    assert gradient[0].any() and not torch.equal(out[0], kept.output[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_absorbs_nothing_more_stays_bit_for_bit(name):
    one = made(name)
    keys, values = random_rows([30, 30])
    before = one.absorb(empty(one, 2), gone(keys, values))
    after = one.absorb(before, gone([keys[0], keys[1][:0]], [values[0], values[1][:0]]))
    assert all(torch.equal(before[x][1], after[x][1]) for x in before)
    assert not all(torch.equal(before[x][0], after[x][0]) for x in before)


@pytest.mark.parametrize("name", NAMES)
def test_rows_alone_are_what_they_are_beside_longer_ones(name):
    one = made(name, **EXACTLY)
    keys, values = random_rows([40, 7, 23])
    together = in_pieces(one, keys, values)
    for r in range(3):
        cut_alike = in_pieces(one, [k if i == r else k[:0] for i, k in enumerate(keys)], values)
        got, expected = (ask(one, state, queries(3)) for state in (together, cut_alike))
        close(part(got, r), part(expected, r))


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_exact_and_the_state_has_one_size_whatever_the_length(name):
    one = made(name)
    weights = set()
    for longest in (1, 50, 300):
        keys, values = random_rows([longest, longest // 2])
        state = in_pieces(one, keys, values)
        assert state["count"].view(2, -1).sum(1).tolist() == [longest, longest // 2]
        weights.add(sum(x.nbytes for x in state.values()))
    assert weights == {2 * one.state_bytes(HEAD_DIM, VALUE_DIM)}


@pytest.mark.parametrize("name", NAMES)
def test_absorbing_changes_neither_the_state_nor_the_pairs(name):
    one = made(name)
    given = gone(*random_rows([20, 3]))
    state = one.absorb(empty(one, 2), given)
    copies = [x.clone() for x in (*state.values(), given.keys, given.values)]
    one.absorb(state, given)
    assert all(torch.equal(a, b) for a, b in zip(copies, [*state.values(), given.keys, given.values], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_pairs_leave_the_same_bits(name):
    one = made(name)
    rows = random_rows([60, 33])
    first, again = in_pieces(one, *rows), in_pieces(one, *rows)
    assert all(torch.equal(first[x], again[x]) for x in first)


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_beyond_the_range_of_float16_do_not_overflow(name):
    keys, values = random_rows([60])
    keys, values = [keys[0] * 3e4], [values[0] * 3e4]
    got, expected = (
        ask(one, one.absorb(empty(one, 1), gone(keys, values)), queries(1) * 1e-4)
        for one in (made(name), made(name, **EXACTLY))
    )
    torch.testing.assert_close(got.output, expected.output, rtol=0.02, atol=0.01 * float(expected.output.abs().max()))
    assert all(x.isfinite().all() for x in vars(got).values())
    if isinstance(got, PartialAttention):
        torch.testing.assert_close(got.lse, expected.lse, rtol=0.01, atol=0.05)


@pytest.mark.parametrize("name", ["centroids", "moments"])
def test_what_is_recalled_is_nearer_than_nothing(name):
    one = made(name)
    keys, values = random_rows([200], spread=0.7)
    kept_keys, kept_values = (x[0] for x in random_rows([20], seed=5))
    given = queries(1)
    exact = merge(attention(given[0], kept_keys, kept_values), attention(given[0], keys[0], values[0]))
    kept = attention(given[0], kept_keys, kept_values)
    found = ask(one, one.absorb(empty(one, 1), gone(keys, values)), given)
    with_memory = merge(kept, PartialAttention(found.output[0], found.lse[0]))
    assert (with_memory - exact).norm() < 0.3 * (kept.output - exact).norm()


@pytest.mark.parametrize("name", NAMES)
def test_heads_read_the_row_of_their_group(name):
    one = made(name, **EXACTLY)
    remains = LayerMemory(memory=one, layer_idx=0, state=empty(one, 4)).absorb(gone(*random_rows([9, 5, 7, 1])))
    query = torch.randn(2, 6, 3, HEAD_DIM)  # two batch rows, two KV heads, three queries per KV
    got = remains.recall(query, slice(0, 4), PLAIN)
    second = remains.recall(query[1:], slice(2, 4), PLAIN)
    close(part(got, slice(1, None)), second)
    for b in range(2):
        for h in range(6):
            state = {x: y[2 * b + h // 3][None] for x, y in remains.state.items()}
            one_head = ask(one, state, query[b, h][None])
            close(part(part(got, b), h), part(one_head, 0))


# Moments.


def test_moments_by_hand():
    one = Moments(dtype="float32", mass=0.1)
    state = one.absorb(one.empty(1, 2, 1, "cpu"), evicted(([[1.0, 0.0], [3.0, 0.0]], [[0.0], [4.0]])))
    assert state["key_mean"].tolist() == [[[2], [0]]] and state["value_mean"].tolist() == [[[2]]]
    assert (state["key_value"] * state["key_value_scale"]).tolist() == [[[2], [0]]]
    assert (state["key_key"] * state["key_key_scale"]).tolist() == [[[1, 0], [0, 0]]]
    given = torch.tensor([[[1.0, 5.0]]])  # times .5: logit 1 at the mean
    got = ask(one, state, given, AttentionScale(0.5))
    assert got.output.item() == pytest.approx(2 + 0.5 * 2)
    assert got.lse.item() == pytest.approx(math.log(2) + 1 + 0.1)  # .25 * 1 / 2 = .125, clamped
    unbound = ask(Moments(dtype="float32", mass=math.inf), state, given, AttentionScale(0.5))
    assert unbound.lse.item() == pytest.approx(math.log(2) + 1 + 0.125)
    first_order = ask(Moments(dtype="float32"), state, given, AttentionScale(0.5))
    assert first_order.lse.item() == pytest.approx(math.log(2) + 1)
    slope = 1 - math.tanh(1 / 4) ** 2
    capped = ask(Moments(dtype="float32"), state, given, AttentionScale(0.5, 4.0))
    assert capped.output.item() == pytest.approx(2 + slope)
    assert capped.lse.item() == pytest.approx(math.log(2) + 4 * math.tanh(1 / 4))


@pytest.mark.parametrize("seed", range(3))
def test_moments_after_many_pieces_are_those_of_one_batch(seed):
    one = Moments(dtype="float32", mass=1.0)
    keys, values = random_rows([150, 4, 1, 0], seed)
    state = in_pieces(one, keys, values, seed)
    for r, (k, v) in enumerate(zip(keys, values, strict=True)):
        n, k, v = len(k), k.double(), v.double()
        assert state["count"][r] == n
        if not n:
            assert not state["key_mean"][r].any() and not state["key_value"][r].any()
            continue
        expected = {"key_mean": k.mean(0)[:, None], "value_mean": v.mean(0)[None]}
        for name, right in (("key_value", v), ("key_key", k)):
            pairs = zip(k - k.mean(0), right - right.mean(0), strict=True)
            expected[name] = sum(torch.outer(a, b) for a, b in pairs) / n
        for name, x in expected.items():
            scale = state[f"{name}_scale"][r] if f"{name}_scale" in state else 1
            torch.testing.assert_close((state[name][r] * scale).double(), x, atol=1e-5, rtol=1e-5)


def test_the_covariance_turns_the_output_towards_the_values_of_the_keys_asked_for():
    """To first order in the query the estimate is exact, so its error falls with the square of the query's length."""
    one = Moments(dtype="float32")
    keys, values = random_rows([50])
    state = one.absorb(empty(one, 1), gone(keys, values))
    errors, plain = [], []
    for size in (0.1, 0.01):
        given = size * queries(1)
        exact = attention(given[0], keys[0], values[0])
        errors.append(float((ask(one, state, given).output[0] - exact.output).norm()))
        plain.append(float((state["value_mean"] - exact.output).norm()))
    assert errors[1] < 0.015 * errors[0] and plain[1] > 0.09 * plain[0]
    capped = AttentionScale(0.4, 2.0)  # and under a softcap
    keys = [keys[0] * 0.02 + 3]
    state = one.absorb(empty(one, 1), gone(keys, values))
    exact = attention(queries(1)[0], keys[0], values[0], capped)
    assert (ask(one, state, queries(1), capped).output[0] - exact.output).norm() < 1e-2 * (
        state["value_mean"] - exact.output
    ).norm()


@pytest.mark.parametrize(
    ("one", "weight"),
    [
        (Moments(), 64 * 64 * 2 + 4 + 8 + 2 * 64 * 4),
        (Moments(dtype="float32"), 64 * 64 * 4 + 4 + 8 + 2 * 64 * 4),
        (Moments(mass=1.0), 2 * (64 * 64 * 2 + 4) + 8 + 2 * 64 * 4),
        (Centroids(), 16 * (4 + 2 * 64 * 2) + 2 * 4),
        (Centroids(centroids=64, dtype="float32"), 64 * (4 + 2 * 64 * 4) + 2 * 4),
    ],
)
def test_what_a_state_weighs(one, weight):
    assert one.state_bytes(64, 64) == weight


def test_docstrings_say_what_the_defaults_weigh_in_pairs():
    pair = 2 * 64 * 2 + 4  # bfloat16 key and value, and a position
    linear, slots = random_weights("linear", 64, 32), random_weights("slots", 64, 16)
    trained = ((Linear, {"latent": linear}), (Slots, {"latent": slots}))
    for cls, given in ((Moments, {}), (Centroids, {}), *trained):
        said = " ".join(cls.__doc__.split())
        default, wide = (one.state_bytes(64, 64) for one in (cls(**given), cls(**given, **EXACTLY)))
        assert f"as much as {round(default / pair)} pairs in bfloat16 ({default:,} bytes a row; " in said
        assert f"{round(wide / pair)} pairs with" in said


# Centroids.


def naive_centroids(pieces: list[tuple[Tensor, Tensor]], size: int, rounds: int):
    """Return counts, keys and values of one row's groups, pair by pair in Python."""
    groups = [(0, [0.0] * HEAD_DIM, [0.0] * VALUE_DIM)] * size
    for keys, values in pieces:
        ks, vs = keys.tolist(), values.tolist()
        vacant = [c for c in range(size) if groups[c][0] == 0]
        seeded = min(len(vacant), len(ks))
        centres = {c: list(groups[c][1]) for c in range(size) if groups[c][0]}
        centres |= {c: ks[i * len(ks) // seeded] for i, c in enumerate(vacant[:seeded])}
        for _ in range(rounds):
            chosen = [min(sorted(centres), key=lambda c: math.dist(k, centres[c])) for k in ks]
            for c in centres:
                mine = [k for k, own in zip(ks, chosen, strict=True) if own == c]
                n, old, _ = groups[c]
                if n + len(mine):
                    centres[c] = [(n * old[j] + sum(k[j] for k in mine)) / (n + len(mine)) for j in range(HEAD_DIM)]
        after = []
        for c, (n, old_key, old_value) in enumerate(groups):
            mine = [(k, v) for k, v, own in zip(ks, vs, chosen, strict=True) if own == c]
            total = n + len(mine)
            key, value = (
                [(n * old[j] + sum(pair[which][j] for pair in mine)) / max(total, 1) for j in range(len(old))]
                for which, old in enumerate((old_key, old_value))
            )
            after.append((total, key, value))
        groups = after
    return groups


@pytest.mark.parametrize("seed", range(4))
def test_centroids_are_those_of_the_naive_oracle(seed):
    one = Centroids(centroids=4, rounds=3, dtype="float32")
    keys, values = random_rows([50], seed)
    pieces = [(keys[0][a:b], values[0][a:b]) for a, b in pairwise([0, 2, 20, 21, 50])]
    state = empty(one, 1)
    for piece in pieces:
        state = one.absorb(state, gone([piece[0]], [piece[1]]))
    expected = naive_centroids(pieces, 4, 3)
    assert state["count"][0].tolist() == [n for n, _, _ in expected]
    assert sum(n > 0 for n, _, _ in expected) > 2
    for name, which in (("keys", 1), ("values", 2)):
        got = state[name][0] * state[f"{name}_scale"][0]
        torch.testing.assert_close(got, torch.tensor([group[which] for group in expected]), atol=1e-5, rtol=1e-5)


def test_as_many_pairs_as_centroids_are_remembered_exactly_however_they_come():
    one = Centroids(centroids=12, dtype="float32")
    keys, values = random_rows([12, 5])
    got = ask(one, in_pieces(one, keys, values), given := queries(2))
    for r in range(2):
        close(PartialAttention(got.output[r], got.lse[r]), attention(given[r], keys[r], values[r]))


def test_clusters_that_are_apart_are_found_and_weigh_what_they_hold():
    one = Centroids(centroids=3, dtype="float32")
    sizes, middles = [5, 20, 2], torch.eye(HEAD_DIM)[:3] * 10
    noise = torch.randn(27, HEAD_DIM, generator=torch.Generator().manual_seed(3)) * 0.01
    keys = middles.repeat_interleave(torch.tensor(sizes), 0) + noise
    order = torch.randperm(27, generator=torch.Generator().manual_seed(4))
    order = torch.cat([torch.tensor([0, 5, 25]).repeat_interleave(9)[::9], order])  # one of each first, then all
    state = empty(one, 1)
    for part in (order[:3], order[3:]):
        state = one.absorb(state, gone([keys[part]], [keys[part][:, :VALUE_DIM]]))
    assert sorted(state["count"][0].tolist()) == [3, 6, 21]
    assert torch.allclose(
        state["keys"][0].sort(0, descending=True)[0][0, :3] * state["keys_scale"], torch.tensor(10.0), atol=0.1
    )


def test_equal_keys_share_a_centroid_and_leave_the_others_empty():
    one = Centroids(centroids=4, dtype="float32")
    state = one.absorb(empty(one, 1), gone([torch.ones(9, HEAD_DIM)], [torch.arange(36.0).view(9, VALUE_DIM)]))
    assert sorted(state["count"][0].tolist()) == [0, 0, 0, 9]
    got = ask(one, state, given := queries(1))
    close(
        PartialAttention(got.output[0], got.lse[0]),
        attention(given[0], torch.ones(9, HEAD_DIM), torch.arange(36.0).view(9, VALUE_DIM)),
    )


def test_log_counts():
    assert log_count(torch.tensor([0.0, 1.0, math.e])).tolist() == pytest.approx([-1e30, 0, 1])


# Ranges that were taken in.


def test_ranges_are_those_of_the_set_of_positions():
    noted, expected = AbsorbedRanges(), {0: set(), 2: set()}
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        b, longest = 2 * (step % 2), 40 - 3 * step
        positions = torch.randint(longest, (step,), generator=generator, dtype=torch.int32)
        noted.add(b, positions, longest)
        expected[b] |= set(positions.tolist())
        for row, known in noted.ranges.items():
            assert {p for span in known for p in range(span.start, span.end)} == expected[row]
            assert all(a.end < b.start for a, b in pairwise(known)), "ranges are apart and ascend"
    everywhere = expected[0] | expected[2]
    for start in range(45):
        for end in range(start + 1, 46):
            assert noted.overlaps(Span(start, end)) == any(p in everywhere for p in range(start, end))


def test_ranges_follow_their_batch_rows():
    noted = AbsorbedRanges()
    noted.add(1, torch.tensor([3, 4, 9]), 12)
    assert noted.ranges == {1: (Span(3, 5), Span(9, 10))}
    assert noted.select([1, 0, 1]).ranges == {0: noted.ranges[1], 2: noted.ranges[1]}


# Names and options.


def test_names_lead_to_classes_and_back():
    for name in MEMORIES:
        assert memory.name_of(memory.make(name)) == name
    assert memory.make("none") is None and memory.resolve("none") is None
    assert memory.make("moments(mass=4, dtype=float32)") == Moments(mass=4.0, dtype="float32")
    assert memory.make("centroids(centroids=64)") == Centroids(centroids=64)
    assert all((memory.resolve(name).__doc__ or "").splitlines()[0].endswith(".") for name in ESTIMATES)

    class Own(Moments):
        pass

    assert memory.name_of(Own()) == "Own"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = memory.Nothing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "moment",
            "unknown memory 'moment'; did you mean 'moments'\\? available: none, centroids, linear, moments, slots",
        ),
        ("none(mass=1)", "memory 'none' takes no options, got mass"),
        ("moments(mas=1)", "memory 'moments' has no option 'mas'; available: dtype, mass"),
        ("moments(dtype=float64)", "unknown dtype 'float64'.*available: float16, float32"),
        ("moments(mass=-1)", "mass must be a number of at least 0, got -1.0"),
        ("moments(mass=many)", "mass takes a number, got 'many'"),
        ("centroids(centroids=0)", "centroids must be an integer of at least 1, got 0"),
        ("centroids(rounds=0)", "rounds must be an integer of at least 1, got 0"),
        ("centroids(rounds=", "cannot read memory 'centroids\\(rounds='"),
    ],
)
def test_what_cannot_be_a_memory_is_refused(text, message):
    with pytest.raises(PolicyError, match=message):
        memory.make(text)


def test_options_given_as_an_object_are_checked_too():
    with pytest.raises(PolicyError, match="unknown dtype 'half'; available: float16, float32"):
        check_dtype("half")
    with pytest.raises(PolicyError, match="mass must be a number of at least 0, got nan"):
        Moments(mass=math.nan)
