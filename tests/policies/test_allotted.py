"""Policies that say how many pairs each row keeps: DuoAttention's classes of heads, XKV's layers."""

import math
from itertools import pairwise

import pytest
import torch

from tests.conftest import made
from tests.policies.test_policies import EXTRAS, naive_attention, naive_snapkv, random_observation, rows_of
from vestige import Budget, InputError, KVCache, PolicyError, attach, policies, prefill
from vestige.policies import duo_attention
from vestige.policies.selection import RowIndex
from vestige.testing import left_padded, random_ids, tiny

SMALL = {"sink": 2, "window": 3, "every": 4}


def grid(*rows: tuple[int, int, int]) -> RowIndex:
    """Return a grid of rows of (pairs, layer, batch row)."""
    return RowIndex(*(torch.tensor(column) for column in zip(*rows, strict=True)))


def held(cache: KVCache) -> list[list[int]]:
    """Return the pairs of each row, layer by layer."""
    return [layer.live_lengths() for layer in cache.evictable]


def read(model, policy, ids, **options) -> KVCache:
    cache = KVCache(model, policy)
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, **options)
    return cache


# DuoAttention.


def duo(tokens: int = 64, **options):
    return policies.DuoAttention(budget=Budget.tokens(tokens), **(SMALL | {"first": 4, "recent": 6} | options))


def naive_duo(seen, first: int, recent: int, retrieval: list[float]) -> list[float]:
    """Return scores from how much of a retrieval head each row's head is."""
    scores = []
    for row, positions in enumerate(rows_of(seen)):
        for position in positions:
            age = seen.seen[row // seen.kv_heads] - 1 - position
            off = min(age / recent, position / first) if position < first else age / recent
            scores.append((1 + retrieval[row]) / (1 + off))
    return scores


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("first", "recent", "observed"), [(2, 3, 4), (0, 1, 2), (3, 5, 32), (128, 256, 4)])
def test_what_heads_are_is_measured_as_the_attention_beyond_first_and_recent_tokens(first, recent, observed, extra):
    seen = random_observation(1, **EXTRAS[extra])
    measured = []
    for row in range(4):
        queries = [
            (seen.seen[row // 2] - n, head) for head in naive_attention(seen, row, observed) for n in [len(head)]
        ]
        beyond = [
            sum(w for position, w in weights.items() if first <= position <= begin + i - recent)
            for begin, head in queries
            for i, weights in enumerate(head)
        ]
        measured.append(sum(beyond) / len(beyond))
    assert (max(measured) > 0) == (recent < 128)
    scores = made("duo_attention", first=first, recent=recent, observed=observed).score(seen)
    torch.testing.assert_close(scores, torch.tensor(naive_duo(seen, first, recent, measured)))


def test_given_heads_are_found_by_layer_and_kv_head():
    seen = random_observation(2)  # layer 3, two KV heads
    given = ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.25, 1.0))
    scores = duo(retrieval=given).score(seen)
    torch.testing.assert_close(scores, torch.tensor(naive_duo(seen, 4, 6, [0.25, 1.0, 0.25, 1.0])))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (((0.5, 1.0),), r"is for 1 layers of \[2\] KV heads, but layer 3 has 2"),
        (((0.5, 1.0, 0.0),) * 4, r"is for 4 layers of \[3\] KV heads, but layer 3 has 2"),
    ],
)
def test_heads_of_another_model_are_refused(given, message):
    with pytest.raises(PolicyError, match=message):
        duo(retrieval=given).score(random_observation(2))


@pytest.mark.parametrize("given", [(), ((),), ((0.5, -0.1),), ((math.inf,),), ((math.nan,),)])
def test_numbers_that_are_no_classes_are_refused(given):
    with pytest.raises(PolicyError, match=r"retrieval needs a finite number of at least 0 .*read_pattern"):
        duo(retrieval=given)


@pytest.mark.parametrize("options", [{"first": -1}, {"recent": 0}, {"observed": 0}])
def test_classes_without_pairs_or_queries_are_refused(options):
    name, value = next(iter(options.items()))
    with pytest.raises(PolicyError, match=f"{name} must be at least {value + 1}, got {value}"):
        duo(**options)


def test_the_best_heads_keep_all_as_long_as_the_others_can_have_what_they_want():
    rows = grid((40, 0, 0), (40, 0, 0), (40, 1, 0), (40, 1, 0))
    best = torch.tensor([1.2, 1.9, 1.0, 1.5]).repeat_interleave(40)
    for room, expected in {
        10: [10, 10, 10, 10],
        15: [10, 30, 10, 10],
        25: [10, 40, 10, 40],
        30: [30, 40, 10, 40],
        40: [40, 40, 40, 40],
        60: [40, 40, 40, 40],
    }.items():
        assert duo().allot(best, rows, torch.tensor([room])).tolist() == expected, room
    short = grid((40, 0, 0), (7, 0, 0))
    assert duo().allot(torch.full((47,), 1.0), short, torch.tensor([5])).tolist() == [10, 7]


def test_batch_rows_have_retrieval_heads_of_their_own():
    rows = grid((40, 0, 0), (40, 0, 0), (30, 0, 1), (30, 0, 1))
    best = torch.cat([torch.tensor([1.0, 1.5]).repeat_interleave(40), torch.tensor([1.5, 1.0]).repeat_interleave(30)])
    assert duo().allot(best, rows, torch.tensor([25, 20])).tolist() == [10, 40, 30, 10]


GIVEN = ((0.1, 0.9), (0.0, 0.2), (1.0, 0.0))


def test_retrieval_heads_keep_everything_and_streaming_heads_first_and_recent_tokens():
    model = tiny("llama")
    cache = read(model, duo(21, retrieval=GIVEN), random_ids(model, 1, 40))
    # 126 pairs: 10 for each of six heads, 30 more for each of the best two, and 6 are left for the third.
    assert held(cache) == [[10, 40], [10, 16], [40, 10]]
    assert cache.evictable[2].positions(0).tolist() == list(range(40))
    for layer, head, recent in ((0, 0, 6), (1, 0, 6), (1, 1, 12), (2, 1, 6)):
        expected = [0, 1, 2, 3, *range(40 - recent, 40)]
        assert cache.evictable[layer].positions(head).tolist() == expected


def test_a_head_that_was_a_retrieval_head_streams_once_the_room_pays_for_fewer():
    model = tiny("llama")
    cache = read(model, duo(21, retrieval=GIVEN), random_ids(model, 1, 40), chunk=16)
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 20, seed=1), cache, chunk=16)
    assert held(cache) == [[10, 26], [10, 10], [60, 10]]


def test_where_the_room_is_too_small_all_heads_stream_alike():
    model = tiny("llama")
    ids, mask = left_padded(model, [40, 25])
    cache = read(model, duo(7, retrieval=GIVEN), ids, attention_mask=mask)
    assert held(cache) == [[7] * 4] * 3
    for layer in cache.evictable:  # beside sinks 2 and window 3, the third of 4 first and the fourth of 6 recent ones
        assert layer.positions(0).tolist() == [0, 1, 2, 36, 37, 38, 39]
        assert layer.positions(2).tolist() == [0, 1, 2, 21, 22, 23, 24]


PUBLISHED = "-9.584426879882812500e-05\t5.585937500000000000e-01\n1.000000000000000000e+00\t1.25\n"


def test_a_published_pattern_is_read_from_its_folder_or_file(tmp_path):
    (tmp_path / "full_attention_heads.tsv").write_text(PUBLISHED)
    expected = ((0.0, 0.55859375), (1.0, 1.0))
    assert duo_attention.read_pattern(tmp_path) == expected
    assert duo_attention.read_pattern(str(tmp_path / "full_attention_heads.tsv")) == expected
    assert duo(retrieval=expected).retrieval == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot read .*full_attention_heads.tsv"),
        ("1.0\tone\n", r"is not a table of numbers separated by tabs.*'one'"),
        ("1.0\t1.0\n0.5\n", r"as many numbers in each line, got \[2, 1\]"),
        ("\n", r"as many numbers in each line, got \[\]"),
    ],
)
def test_what_is_no_pattern_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "full_attention_heads.tsv").write_text(text)
    with pytest.raises(InputError, match=message):
        duo_attention.read_pattern(tmp_path if text is not None else tmp_path / "full_attention_heads.tsv")


def test_given_heads_survive_saving(tmp_path):
    model = tiny("llama")
    cache = read(model, duo(12, retrieval=GIVEN), random_ids(model, 1, 30))
    cache.save(tmp_path / "kept")
    assert KVCache.load(tmp_path / "kept", model).policy == cache.policy


# XKV.


def by_layer(tokens: int = 64, **options):
    return policies.XKV(budget=Budget.tokens(tokens), **(SMALL | {"observed": 5, "kernel": 3} | options))


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("observed", "kernel"), [(1, 1), (3, 5), (32, 3)])
def test_a_token_is_worth_snapkvs_score_averaged_over_the_heads_that_hold_it(observed, kernel, extra):
    seen = random_observation(3, kv_heads=3, **EXTRAS[extra])
    per_row = naive_snapkv(seen, observed, kernel)
    expected = []
    for row, positions in enumerate(rows_of(seen)):
        b = row // 3
        for position in positions:
            found = [
                score
                for other in range(b * 3, b * 3 + 3)
                for at, score in zip(
                    rows_of(seen)[other], per_row[slice(*seen.cu_seqlens[other : other + 2])], strict=True
                )
                if at == position
            ]
            expected.append(sum(found) / len(found))
    scores = made("xkv", observed=observed, kernel=kernel).score(seen)
    torch.testing.assert_close(scores, torch.tensor(expected))


def greedy(importance: list[list[float]], heads: list[int], room: int, window: int) -> list[int]:
    """Return the tokens of each layer: given out one by one to where the next best has the largest share.

    Args:
        importance: Scores of each layer's tokens, the window's included.
        heads: KV heads of each layer, each of which holds the tokens.
        room: Pairs to give out.
        window: Tokens that each layer holds anyway.
    """
    shares = [sorted((x / sum(layer) for x in layer), reverse=True) for layer in importance]
    counts = [0] * len(shares)
    left = room - sum(window * n for n in heads)
    while True:
        layer = max(range(len(shares)), key=lambda i: shares[i][counts[i]] if counts[i] < len(shares[i]) else -1)
        if left < heads[layer] or counts[layer] == len(shares[layer]):
            return [window + n for n in counts]
        counts[layer], left = counts[layer] + 1, left - heads[layer]


@pytest.mark.parametrize("heads", [[2, 2, 2], [1, 1, 1], [3, 3, 3]])
@pytest.mark.parametrize("seed", range(3))
def test_layers_get_what_a_greedy_choice_gives_them(seed, heads):
    generator = torch.Generator().manual_seed(seed)
    spread = [0.5, 2.0, 6.0]  # the last layer looks at few tokens
    layers = [(spread[i] * torch.randn(20, generator=generator)).exp() for i in range(3)]
    rows = grid(*((20, i, 0) for i in range(3) for _ in range(heads[i])))
    scores = torch.cat([layer for i, layer in enumerate(layers) for _ in range(heads[i])])
    room = 9
    wanted = by_layer().allot(scores, rows, torch.tensor([room]))
    counts = greedy([layer.tolist() for layer in layers], heads, room * sum(heads), window=3)
    got = [per_layer[0] for per_layer in wanted.split(heads)]
    assert all((per_layer == per_layer[0]).all() for per_layer in wanted.split(heads))
    assert wanted.sum() == room * sum(heads)
    assert all(abs(float(x) - n) < 1 for x, n in zip(got, counts, strict=True)), "but for a token that some heads hold"
    assert counts[2] < counts[0], "a layer that looks at few tokens needs little room"


def test_layers_hold_what_they_were_given_and_the_same_tokens_in_all_heads():
    model = tiny("llama")
    ids, mask = left_padded(model, [50, 35])
    cache = read(model, by_layer(12), ids, attention_mask=mask)
    assert cache.held == 12 * 6 * 2
    spread = set()
    for layer, rows in zip(cache.evictable, held(cache), strict=True):
        for b in range(2):
            one, other = (set(layer.positions(2 * b + head).tolist()) for head in range(2))
            assert abs(len(one) - len(other)) <= 1 and (one <= other or other <= one)
            spread.add(rows[2 * b])
    assert len(spread) > 2, "layers differ"


def test_a_profile_fixes_the_proportions():
    model = tiny("llama")
    cache = read(model, by_layer(12, profile=(1.0, 2.0, 3.0)), random_ids(model, 1, 50))
    assert held(cache) == [[6, 6], [12, 12], [18, 18]]


def test_a_profile_of_another_model_is_refused():
    model = tiny("llama")
    with pytest.raises(PolicyError, match="profile is for 2 layers, but the model has 3"):
        read(model, by_layer(12, profile=(1.0, 2.0)), random_ids(model, 1, 50))


@pytest.mark.parametrize("profile", [(), (0.0, 0.0), (1.0, -1.0), (math.inf, 1.0), (math.nan, 1.0)])
def test_a_profile_without_room_is_refused(profile):
    with pytest.raises(PolicyError, match="profile needs a number of at least 0 for each layer"):
        by_layer(profile=profile)


@pytest.mark.parametrize("options", [{"observed": 0}, {"kernel": 4}])
def test_xkv_refuses_what_snapkv_refuses(options):
    with pytest.raises(PolicyError, match="observed must be at least 1 and kernel odd"):
        by_layer(**options)


def test_a_profile_survives_saving(tmp_path):
    model = tiny("llama")
    cache = read(model, by_layer(12, profile=(1.0, 2.0, 3.0)), random_ids(model, 1, 30))
    cache.save(tmp_path / "kept")
    assert KVCache.load(tmp_path / "kept", model).policy == cache.policy


def test_rows_are_in_the_order_that_allotments_take_them_in():
    seen = random_observation(0)
    assert [end - start for start, end in pairwise(seen.cu_seqlens)] == [len(row) for row in rows_of(seen)]
