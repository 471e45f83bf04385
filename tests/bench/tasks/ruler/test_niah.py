"""The grid of depth and length: one needle, at the depth that its tag says."""

import re
from pathlib import Path

import pytest

from vestige import InputError
from vestige.bench.sample import Sample
from vestige.bench.tasks import TaskSpec, make

pytest.importorskip("wonderwords")


def count(text: str) -> int:
    return len(text.split())


def measure(turns) -> int:
    return sum(count(f"{t.context} {t.question} {t.answer_prefix}") + t.max_new_tokens for t in turns)


@pytest.fixture
def essays(tmp_path) -> Path:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(" ".join(f"Essay {i} goes on to its line {n}." for n in range(80)))
    return tmp_path


def niah(folder: Path, **changes) -> list[Sample]:
    given = {"length": 900, "samples": 10, "essays": folder, "count": count, "measure": measure}
    return make("niah", TaskSpec(**{**given, **changes}))


def test_depths_take_turns_and_the_needle_lies_where_the_tag_says(essays):
    found = niah(essays)
    assert [sample.tags for sample in found] == [{"depth": d} for d in (0.0, 0.25, 0.5, 0.75, 1.0)] * 2
    for sample in found:
        (turn,) = sample.turns
        lines = re.findall(r"Essay \d goes on to its line \d+\.|One of .+? is: \d{7}\.", turn.context)
        (place,) = (i for i, line in enumerate(lines) if line.startswith("One of"))
        assert place == int(sample.tags["depth"] * (len(lines) - 1))


def test_a_sample_asks_for_the_one_number_in_its_text(essays):
    for sample in niah(essays):
        (turn,) = sample.turns
        ((name, value),) = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", turn.context)
        assert (turn.answers, turn.metric, turn.max_new_tokens) == ((value,), "string_match_all", 128)
        assert turn.question == f"What is the special magic number for {name} mentioned in the provided text?"
        assert turn.answer_prefix == f"The special magic number for {name} mentioned in the provided text is"


def test_rows_are_named_niah_and_each_length_is_filled(essays):
    for length in (400, 1500):
        for i, sample in enumerate(niah(essays, length=length)):
            assert (sample.task, sample.index, sample.length) == ("niah", i, length)
            assert length - 10 < measure(sample.turns) <= length


def test_the_same_order_gives_the_same_samples_and_more_do_not_change_the_first(essays):
    assert niah(essays, samples=3) == niah(essays)[:3]
    assert len(niah(essays, samples=None)) == 20
    assert niah(essays, seed=1) != niah(essays)


def test_dev_and_test_share_neither_essays_nor_keys(essays):
    dev, test = (
        {w for s in niah(essays, split=split) for w in re.findall(r"Essay \d|for \S+-\S+ is", s.turns[0].context)}
        for split in ("dev", "test")
    )
    assert {"Essay 0", "Essay 2"} < dev and {"Essay 1", "Essay 3"} < test
    assert not dev & test


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": None}, "niah needs --length"),
        ({"length": 50}, r"niah needs at least \d+ tokens, but --length is 50"),
        ({"essays": Path("absent")}, "--essays absent is not a folder"),
    ],
)
def test_what_cannot_be_made_is_one_clear_error(essays, changes, message):
    with pytest.raises(InputError, match=message):
        niah(essays, **changes)


def test_niah_has_no_parts(essays):
    with pytest.raises(InputError, match="niah has no parts, got niah/essay"):
        make("niah/essay", TaskSpec(count=count, measure=measure, length=900, essays=essays))
