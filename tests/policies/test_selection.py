"""Selection against an oracle in plain Python: sets, sorting and exact fractions instead of packed sorts."""

from collections import defaultdict
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vestige import BudgetError, PolicyError
from vestige.policies.selection import (
    SHARES,
    RowIndex,
    Scale,
    count_protected,
    keep_topk,
    refuse_nan,
    rescale,
    select,
)

QUICK = settings(deadline=None, derandomize=True, max_examples=30)
INF, NAN = float("inf"), float("nan")
SCALE, FLOOR = st.sampled_from(get_args(Scale)), st.sampled_from([0.0, 0.3, 1.0])


@dataclass(frozen=True)
class Pair:
    """One pair of a scene, with the packed index it is found at."""

    at: int
    row: int
    layer: int
    batch: int
    position: int
    score: float
    protected: bool


@dataclass(frozen=True)
class Scene:
    """Rows of pairs and the room they compete for: what ``select`` is asked about."""

    rows: list[tuple[int, int, list[tuple[int, float, bool]]]]
    """Layer, batch row and pairs (position, score, protected) of each row, positions ascending."""
    room: list[int]

    @property
    def grid(self) -> RowIndex:
        columns = zip(*((len(pairs), layer, batch) for layer, batch, pairs in self.rows), strict=True)
        return RowIndex(*(torch.tensor(column) for column in columns))

    @property
    def pairs(self) -> list[Pair]:
        flat = [(r, layer, b, *pair) for r, (layer, b, pairs) in enumerate(self.rows) for pair in pairs]
        return [Pair(at, *fields) for at, fields in enumerate(flat)]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, positions and protection, packed."""
        return (
            torch.tensor([pair.score for pair in self.pairs], dtype=torch.float32),
            torch.tensor([pair.position for pair in self.pairs], dtype=torch.int32),
            torch.tensor([pair.protected for pair in self.pairs], dtype=torch.bool),
        )

    def select(self, share="head", scale="calibrated", **options) -> list[bool]:
        room = torch.tensor(self.room)
        return select(*self.tensors, self.grid, room, share=share, scale=scale, **options).tolist()

    def group(self, pair: Pair, share: str) -> object:
        """Return whom a pair competes with."""
        return {"head": pair.row, "layer": (pair.layer, pair.batch), "model": pair.batch}[share]

    def group_room(self, share: str) -> dict[object, int]:
        totals: dict[object, int] = defaultdict(int)
        for r, (layer, batch, _) in enumerate(self.rows):
            totals[{"head": r, "layer": (layer, batch), "model": batch}[share]] += self.room[batch]
        return totals


def oracle(scene: Scene, share: str, scale: str, floor: float = 0.0) -> set[int]:
    """Return which pairs stay: by sorting, one group after the other."""
    worth = worths(scene, share, scale)
    first = {pair.at for pair in scene.pairs if pair.protected}
    if share != "head":
        for r, (_, batch, _) in enumerate(scene.rows):
            least = int(Fraction(floor).limit_denominator(1000) * scene.room[batch])
            first |= best([pair for pair in scene.pairs if pair.row == r], least, first, worth)
    kept: set[int] = set()
    for group, room in scene.group_room(share).items():
        kept |= best([pair for pair in scene.pairs if scene.group(pair, share) == group], room, first, worth)
    return kept


def worths(scene: Scene, share: str, scale: str) -> dict[int, Any]:
    """Return what each pair is worth to its group."""
    if share != "model" or scale == "calibrated":
        return {pair.at: pair.score for pair in scene.pairs}
    return {pair.at: comparable(scene, pair, scale) for pair in scene.pairs}


def best(pairs: list[Pair], count: int, first: set[int], worth: dict[int, Any]) -> set[int]:
    """Return the ``count`` best of some pairs: those of ``first``, then by worth, then the later one."""
    forced = [pair for pair in pairs if pair.at in first]
    others = sorted((pair for pair in pairs if pair.at not in first), key=lambda p: (worth[p.at], p.position))
    room = max(count - len(forced), 0)
    return {pair.at for pair in forced + others[::-1][:room]}


def comparable(scene: Scene, pair: Pair, scale: str) -> Fraction | float:
    """Return a score that is comparable between layers, by the definition, over the layer's unprotected pairs."""
    if pair.protected:
        return 0  # it stays anyway
    layer = [p.score for p in scene.pairs if (p.layer, p.batch) == (pair.layer, pair.batch) and not p.protected]
    if scale == "mass":
        return Fraction(pair.score) / (Fraction(sum(layer)) or 1)
    mean = sum(layer) / len(layer)
    deviation = (sum((score - mean) ** 2 for score in layer) / len(layer)) ** 0.5
    return (pair.score - mean) / (deviation or 1)


def ranked(scene: Scene, kept: set[int], share: str, scale: str) -> list[tuple]:
    """Return what stays, without telling apart pairs of equal worth and position in different rows of a group."""
    worth = worths(scene, share, scale)
    return sorted(
        (str(scene.group(pair, share)), worth[pair.at], pair.position) for pair in scene.pairs if pair.at in kept
    )


ROW = st.lists(st.sampled_from([None, *[(float(n), False) for n in range(5)], (-INF, True), (99.0, True)]), max_size=7)
"""What a row holds at each position: nothing, or a score and whether it is protected."""


@st.composite
def scenes(draw) -> Scene:
    """Return up to three layers, whose KV heads may differ, of up to two batch rows; room for all that is protected."""
    batch, rows = draw(st.integers(1, 2)), []
    for layer, heads in enumerate(draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))):
        for row in range(batch * heads):
            rows.append((layer, row // heads, [(p, *cell) for p, cell in enumerate(draw(ROW)) if cell is not None]))
    if not any(pairs for *_, pairs in rows):
        rows[0][2].append((0, 0.0, False))
    room = []
    for b in range(batch):
        guarded = max(sum(s for *_, s in pairs) for _, batch_row, pairs in rows if batch_row == b)
        room.append(guarded + draw(st.integers(0, 4)))
    return Scene(rows, room)


def random_scene(seed: int, layers: int = 3, batch: int = 2, heads: int = 2, held: int = 12, room: int = 5) -> Scene:
    """Return a scene of continuous scores, in which no two are equal; the first two pairs of a row are protected."""
    scores = torch.randn(layers, batch, heads, held, generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [
        (layer, b, [(p, scores[layer][b][h][p], p < 2) for p in range(held)])
        for layer in range(layers)
        for b in range(batch)
        for h in range(heads)
    ]
    return Scene(rows, [room] * batch)


def rescored(scene: Scene, layer: int, change) -> Scene:
    """Return a scene in which one layer's scores are changed."""
    rows = [
        (number, b, [(p, change(score) if number == layer else score, s) for p, score, s in pairs])
        for number, b, pairs in scene.rows
    ]
    return replace(scene, rows=rows)


@pytest.mark.parametrize("share", SHARES)
@settings(QUICK, max_examples=80)
@given(scene=scenes(), scale=st.sampled_from(["calibrated", "mass"]), floor=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_selection_equals_the_naive_one(share, scene, scale, floor):
    kept = {at for at, stays in enumerate(scene.select(share, scale, floor=floor)) if stays}
    assert ranked(scene, kept, share, scale) == ranked(scene, oracle(scene, share, scale, floor), share, scale)


@pytest.mark.parametrize("floor", [0.0, 0.5])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("seed", range(5))
def test_signed_selection_equals_the_naive_one(seed, share, floor):
    scene = random_scene(seed)
    kept = scene.select(share, "signed", floor=floor)
    assert {at for at, stays in enumerate(kept) if stays} == oracle(scene, share, "signed", floor)


@pytest.mark.parametrize("share", SHARES)
@QUICK
@given(scene=scenes(), scale=SCALE, floor=FLOOR)
def test_a_group_keeps_exactly_its_room_or_all_it_has(share, scene, scale, floor):
    kept = scene.select(share, scale, floor=floor)
    for group, room in scene.group_room(share).items():
        members = [pair.at for pair in scene.pairs if scene.group(pair, share) == group]
        assert sum(kept[at] for at in members) == min(room, len(members))


@pytest.mark.parametrize("share", SHARES)
@QUICK
@given(scene=scenes(), scale=SCALE, floor=FLOOR)
def test_protected_pairs_stay_whatever_their_score(share, scene, scale, floor):
    kept = scene.select(share, scale, floor=floor)
    assert all(kept[pair.at] for pair in scene.pairs if pair.protected)


@pytest.mark.parametrize("share", SHARES)
@QUICK
@given(scene=scenes(), more=st.integers(0, 5))
def test_a_pair_that_stays_with_little_room_stays_with_more(share, scene, more):
    roomier = replace(scene, room=[n + more for n in scene.room])
    assert all(wide for narrow, wide in zip(scene.select(share), roomier.select(share), strict=True) if narrow)


@pytest.mark.parametrize("share", SHARES)
@QUICK
@given(scene=scenes(), scale=SCALE, floor=FLOOR)
def test_a_batch_row_alone_is_selected_as_it_is_in_a_batch(share, scene, scale, floor):
    together = scene.select(share, scale, floor=floor)
    for b, room in enumerate(scene.room):
        alone = Scene([row for row in scene.rows if row[1] == b], [0] * b + [room])
        if not alone.pairs:
            continue
        here = [pair.at for pair in scene.pairs if pair.batch == b]
        assert alone.select(share, scale, floor=floor) == [together[at] for at in here]


@pytest.mark.parametrize("share", SHARES)
def test_ties_go_to_the_later_token(share):
    row = [(p, 1.0, False) for p in range(6)]
    kept = Scene([(0, 0, row), (0, 0, row), (1, 0, row)], [2]).select(share)
    assert kept == [False, False, False, False, True, True] * 3


def test_ties_go_to_the_later_token_of_any_row_of_the_group():
    old, new = [(p, 1.0, False) for p in (0, 1, 2)], [(p, 1.0, False) for p in (3, 4, 5)]
    assert Scene([(0, 0, old), (0, 0, new)], [2]).select("layer") == [False, False, True, True, True, True]


def test_share_head_keeps_as_many_in_every_row():
    rich, poor = (
        [(0, 9.0, False), (1, 8.0, False), (2, 7.0, False)],
        [(0, 1.0, False), (1, 2.0, False), (2, 3.0, False)],
    )
    assert Scene([(0, 0, rich), (0, 0, poor)], [1]).select("head") == [True, False, False, False, False, True]


def test_share_layer_lets_the_rows_of_a_layer_compete_but_not_the_layers():
    rich, poor = [(0, 9.0, False), (1, 8.0, False)], [(0, 1.0, False), (1, 2.0, False)]
    rows = [(0, 0, rich), (0, 0, poor), (1, 0, poor), (1, 0, poor)]
    assert Scene(rows, [1]).select("layer") == [True, True, False, False, False, True, False, True]


def test_share_model_lets_all_layers_compete():
    rich, poor = [(0, 9.0, False), (1, 8.0, False)], [(0, 1.0, False), (1, 2.0, False)]
    assert Scene([(0, 0, rich), (1, 0, poor)], [1]).select("model") == [True, True, False, False]


def test_batch_rows_have_their_own_room():
    row = [(p, float(p), False) for p in range(4)]
    scene = Scene([(0, 0, row), (0, 1, row), (1, 0, row), (1, 1, row)], [1, 3])
    for share in SHARES:
        kept = torch.tensor(scene.select(share)).view(2, 2, 4)
        assert kept.sum((0, 2)).tolist() == [2, 6]


def test_a_floor_leaves_each_row_its_share_of_the_average():
    rich, poor = [(p, 9.0 + p, False) for p in range(8)], [(p, float(p), False) for p in range(8)]
    scene = Scene([(0, 0, rich), (0, 0, poor)], [4])
    assert scene.select("layer") == [True] * 8 + [False] * 8
    assert scene.select("layer", floor=0.5) == [False] * 2 + [True] * 6 + [False] * 6 + [True] * 2
    assert scene.select("model", floor=0.29) == [False] * 1 + [True] * 7 + [False] * 7 + [True] * 1


@pytest.mark.parametrize("share", ["layer", "model"])
def test_a_floor_of_the_whole_average_makes_full_rows_equal(share):
    scene = random_scene(0)
    assert scene.select(share, floor=1.0) == scene.select("head")


def test_a_floor_gives_way_to_what_other_rows_protect():
    """Rows that lost a token before its span was pinned protect less than others; together they fit all the same."""
    pinned, free = [(p, 0.0, True) for p in range(6)], [(p, 1.0, False) for p in range(6)]
    kept = Scene([(0, 0, pinned), (0, 0, free)], [4]).select("layer", floor=1.0)
    assert kept == [True] * 6 + [False] * 4 + [True] * 2


@QUICK
@given(scene=scenes(), data=st.data(), share=st.sampled_from(SHARES), floor=st.sampled_from([0.0, 0.5]))
def test_fixed_counts_decide_alone_how_many_each_row_keeps(scene, data, share, floor):
    counts = [sum(s for *_, s in pairs) + data.draw(st.integers(0, 8)) for *_, pairs in scene.rows]
    kept = scene.select(share, "mass", floor=floor, counts=torch.tensor(counts))
    for r, (_, _, pairs) in enumerate(scene.rows):
        mine = [pair for pair in scene.pairs if pair.row == r]
        assert sum(kept[pair.at] for pair in mine) == min(counts[r], len(pairs))
        first = {pair.at for pair in mine if pair.protected}
        assert {p.at for p in mine if kept[p.at]} == best(mine, counts[r], first, {p.at: p.score for p in mine})


def test_fixed_counts_may_exceed_the_room_of_a_row():
    row = [(p, float(p), False) for p in range(4)]
    assert (
        Scene([(0, 0, row), (1, 0, row)], [1]).select(counts=torch.tensor([3, 0])) == [False] + [True] * 3 + [False] * 4
    )


@pytest.mark.parametrize(("share", "guarded", "room"), [("head", 5, 3), ("layer", 10, 6), ("model", 20, 12)])
def test_more_protected_pairs_than_room_are_refused_with_both_numbers(share, guarded, room):
    row = [(p, 1.0, p < 5) for p in range(9)]
    scene = Scene([(0, 0, row), (0, 0, row), (1, 0, row), (1, 0, row)], [3])
    with pytest.raises(BudgetError) as refusal:
        scene.select(share, floor=0.2)
    words = str(refusal.value).replace(",", " ").split()
    assert str(guarded) in words
    assert str(room) in words


def test_the_group_that_lacks_most_is_the_one_that_is_named():
    protected = torch.ones(7, dtype=torch.bool)
    groups, counts = torch.tensor([0, 0, 1, 1, 1, 1, 1]), torch.tensor([1, 2])
    with pytest.raises(BudgetError, match="5 pairs.*2$"):
        keep_topk(torch.zeros(7), torch.arange(7), protected, groups, counts)


def test_a_protected_row_may_have_more_than_the_average_where_rows_share():
    row, bare = [(p, 1.0, True) for p in range(4)], [(p, 1.0, False) for p in range(4)]
    scene = Scene([(0, 0, row), (0, 0, bare)], [3])
    assert scene.select("layer") == [True] * 4 + [False] * 2 + [True] * 2
    with pytest.raises(BudgetError):
        scene.select("head")


@pytest.mark.parametrize("share", SHARES)
def test_a_score_that_is_not_a_number_is_refused_and_its_layer_named(share):
    whole, broken = [(0, 1.0, False), (1, 2.0, False)], [(0, NAN, False), (1, 1.0, False), (2, NAN, True)]
    scene = Scene([(2, 0, whole), (5, 0, broken), (9, 0, broken)], [1])
    with pytest.raises(PolicyError, match="4 scores.*layer 5"):
        scene.select(share)


def test_infinite_scores_are_numbers():
    scene = Scene([(0, 0, [(0, INF, False), (1, -INF, False), (2, 0.0, False)])], [2])
    refuse_nan(scene.tensors[0], scene.grid)
    for share in SHARES:
        assert scene.select(share) == [True, False, True]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("scale", ["calibrated", "mass", "signed"])
def test_selection_leaves_what_it_was_given_as_it_was(share, scale):
    scene = random_scene(1)
    given_tensors, room, grid = scene.tensors, torch.tensor(scene.room), scene.grid
    select(*given_tensors, grid, room, share=share, scale=scale, floor=0.5)
    for now, before in zip(given_tensors, scene.tensors, strict=True):
        assert torch.equal(now, before)
    assert room.tolist() == scene.room
    assert torch.equal(grid.lengths, scene.grid.lengths)


@pytest.mark.parametrize("scale", ["calibrated", "mass"])
@pytest.mark.parametrize("share", SHARES)
def test_nothing_held_is_nothing_kept(share, scale):
    assert Scene([(0, 0, []), (1, 0, [])], [3]).select(share, scale) == []


def test_layers_may_be_numbered_with_gaps():
    scene, names = random_scene(2), [5, 11, 17]
    gapped = replace(scene, rows=[(names[layer], b, pairs) for layer, b, pairs in scene.rows])
    for share in SHARES:
        assert gapped.select(share, "mass", floor=0.2) == scene.select(share, "mass", floor=0.2)


def test_a_grid_names_the_row_of_each_pair_and_who_competes():
    grid = RowIndex(torch.tensor([2, 0, 1, 1]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
    assert grid.row.tolist() == [0, 0, 2, 3]
    assert grid.groups("head").tolist() == [0, 1, 2, 3]
    assert len(set(grid.groups("layer").tolist())) == 4
    assert grid.groups("model").tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("scale", ["mass", "signed"])
@pytest.mark.parametrize("seed", range(3))
def test_rescaling_keeps_the_order_within_a_layer(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(60, generator=generator)
    layers = torch.randint(3, (60,), generator=generator)
    protected = torch.rand(60, generator=generator) < 0.3
    scaled = rescale(scores, protected, layers, scale)
    for layer in range(3):
        order = scores[layers == layer].argsort()
        assert (scaled[layers == layer][order].diff() >= 0).all()


@pytest.mark.parametrize("scale", ["mass", "signed"])
def test_an_infinite_score_keeps_its_place_in_the_layer(scale):
    scores = torch.tensor([-INF, 1.0, 3.0, INF]) if scale == "signed" else torch.tensor([0.0, 1.0, 3.0, INF])
    scaled = rescale(scores, torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.long), scale)
    assert (scaled[1:] > scaled[:-1]).all(), scaled


def test_calibrated_scores_stay_as_they_are():
    scores = torch.tensor([0.5, -3.0, INF])
    scaled = rescale(scores, torch.tensor([False, True, False]), torch.tensor([0, 0, 1]), "calibrated")
    assert torch.equal(scaled, scores)


def test_mass_makes_a_score_the_share_of_what_its_layer_has_to_give_away():
    scores, layers = torch.tensor([1.0, 3.0, 90.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 1, 1])
    protected = torch.tensor([False, False, True, False, False])
    scaled = rescale(scores, protected, layers, "mass")
    assert scaled[~protected].tolist() == [0.25, 0.75, 0.5, 0.5]


def test_signed_gives_z_scores_over_the_unprotected_pairs():
    scores, layers = torch.tensor([-1.0, 1.0, 90.0, 10.0, 30.0]), torch.tensor([0, 0, 0, 1, 1])
    protected = torch.tensor([False, False, True, False, False])
    scaled = rescale(scores, protected, layers, "signed")
    assert scaled[~protected].tolist() == [-1.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize("scale", ["mass", "signed"])
def test_a_layer_without_spread_or_mass_gives_numbers(scale):
    scores, layers = torch.tensor([0.0, 0.0, 7.0, 7.0, 1.0]), torch.tensor([0, 0, 1, 1, 2])
    protected = torch.tensor([False, False, True, True, False])
    assert not rescale(scores, protected, layers, scale)[~protected].isnan().any()


@QUICK
@given(scene=scenes(), layer=st.integers(0, 2))
def test_scaling_a_layer_leaves_the_mass_selection_unchanged(scene, layer):
    assert rescored(scene, layer, lambda score: 10 * score).select("model", "mass") == scene.select("model", "mass")


@pytest.mark.parametrize("seed", range(3))
def test_scaling_and_shifting_a_layer_leaves_the_signed_selection_unchanged(seed):
    scene = random_scene(seed)
    changed = rescored(scene, 1, lambda score: 10 * score + 3)
    assert changed.select("model", "signed") == scene.select("model", "signed")


def test_scaling_a_layer_changes_the_calibrated_selection_in_its_favour():
    rows = [(layer, 0, [(p, 1.0 + p + layer / 2, False) for p in range(6)]) for layer in range(2)]
    scene = Scene(rows, [3])
    scaled = rescored(scene, 0, lambda score: 10 * score)
    assert scene.select("model", "calibrated") == ([False] * 3 + [True] * 3) * 2
    assert scaled.select("model", "calibrated") == [True] * 6 + [False] * 6
    assert scaled.select("layer", "calibrated") == scene.select("layer", "calibrated")


@pytest.mark.parametrize("scale", ["mass", "signed"])
@pytest.mark.parametrize("extreme", [0.0, 1e6, -INF, INF])
@pytest.mark.parametrize("seed", range(3))
def test_protected_pairs_do_not_enter_a_layers_sums(seed, extreme, scale):
    scene = rescored(rescored(random_scene(seed), 0, abs), 1, abs)
    rows = [(n, b, [(p, extreme if s else score, s) for p, score, s in pairs]) for n, b, pairs in scene.rows]
    assert replace(scene, rows=rows).select("model", scale) == scene.select("model", scale)


def test_protected_pairs_are_counted_by_row():
    scene = random_scene(1, layers=2, batch=1)
    assert count_protected(scene.tensors[2], scene.grid).tolist() == [2] * 4


@pytest.mark.parametrize("share", SHARES)
def test_fixed_counts_leave_no_one_to_compete_with(share):
    scene = random_scene(2, layers=2, batch=1)
    counts = [3, 12, 0, 7]
    with pytest.raises(BudgetError, match="2 pairs are protected, the budget has room for 0"):
        scene.select(share, counts=torch.tensor(counts))
    counts[2] = 2
    kept = scene.select(share, scale="mass", floor=0.9, counts=torch.tensor(counts))
    for row, count in enumerate(counts):
        mine = [pair for pair in scene.pairs if pair.row == row]
        expected = best(mine, count, {pair.at for pair in mine if pair.protected}, {p.at: p.score for p in mine})
        assert {pair.at for pair in mine if kept[pair.at]} == expected
