"""Dialogues: what is told, what is asked, and that all of it fits."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from vestige.bench.tasks import TaskSpec, make
from vestige.bench.tasks.dialogue import PARTS, TURNS
from vestige.errors import InputError

FACT = re.compile(r"One of the special magic numbers for (\S+) is: (\d{7})\.")


def count(text: str) -> int:
    return len(text.split())


@pytest.fixture
def order(tmp_path: Path) -> TaskSpec:
    for name in ("one", "two"):
        lines = (f"The {name} keeper number {n} lit lamp {n * 7} before the fog came in." for n in range(60))
        (tmp_path / f"{name}.txt").write_text(" ".join(lines))
    return TaskSpec(
        count=count,
        measure=lambda turns: sum(count(t.context) + count(t.question) + t.max_new_tokens for t in turns),
        length=600,
        samples=6,
        essays=tmp_path,
    )


def told(sample) -> list[dict[str, str]]:
    """Return the facts that each turn tells."""
    return [dict(FACT.findall(turn.context)) for turn in sample.turns]


def asked(turn) -> str:
    found = re.fullmatch(r"What is the special magic number for (\S+)\?", turn.question)
    assert found is not None
    return found[1]


def test_both_parts_are_made_and_one_can_be_named(order):
    assert [s.task for s in make("dialogue", order)] == ["dialogue/retrieval"] * 6 + ["dialogue/recall"] * 6
    assert make("dialogue/recall", order) == make("dialogue", order)[6:]
    with pytest.raises(InputError, match="unknown part of dialogue 'recal'; did you mean 'recall'"):
        make("dialogue/recal", order)
    with pytest.raises(InputError, match="needs --length"):
        make("dialogue", replace(order, length=None))


@pytest.mark.parametrize("part", PARTS)
def test_all_turns_together_fit_and_one_more_sentence_a_turn_would_not(order, part):
    for sample in make(f"dialogue/{part}", order):
        total = order.measure(sample.turns)
        assert total <= 600 and len(sample.turns) == TURNS
        assert total > 600 - TURNS * 20  # a sentence is 13 words


def test_retrieval_tells_everything_first_and_asks_for_another_fact_each_turn(order):
    for sample in make("dialogue/retrieval", order):
        facts = told(sample)
        assert len(facts[0]) == TURNS and facts[1:] == [{}] * (TURNS - 1)
        assert all(turn.context == "" for turn in sample.turns[1:])
        assert {asked(turn) for turn in sample.turns} == set(facts[0])
        assert [turn.answers for turn in sample.turns] == [(facts[0][asked(turn)],) for turn in sample.turns]


def test_recall_asks_for_what_an_earlier_turn_told_and_never_twice(order):
    gaps = set()
    for sample in make("dialogue/recall", order):
        facts = told(sample)
        assert [len(one) for one in facts] == [2] * TURNS
        names = [asked(turn) for turn in sample.turns]
        assert len(set(names)) == TURNS
        for t, (name, turn) in enumerate(zip(names, sample.turns, strict=True)):
            (at,) = (i for i, one in enumerate(facts) if name in one)
            assert at < t or at == t == 0
            assert turn.answers == (facts[at][name],)
            gaps.add(t - at)
    assert gaps > {0, 1}, "some facts are asked for turns later"


def test_turns_go_on_in_the_essays_where_the_last_one_ended(order):
    (sample,) = make("dialogue/recall", replace(order, samples=1))
    numbers = [int(n) for turn in sample.turns for n in re.findall(r"keeper number (\d+)", turn.context)]
    assert numbers == [(numbers[0] + i) % 60 for i in range(len(numbers))]


def test_samples_are_the_same_for_one_seed_and_the_splits_share_no_fact(order):
    assert make("dialogue", order) == make("dialogue", order)
    assert make("dialogue", replace(order, samples=2))[:2] == make("dialogue", order)[:2]
    assert make("dialogue", replace(order, seed=1)) != make("dialogue", order)
    names = [
        {name for s in make("dialogue", replace(order, split=split)) for one in told(s) for name in one}
        for split in ("dev", "test")
    ]
    assert not names[0] & names[1]


def test_a_length_that_the_shortest_texts_exceed_is_an_error_with_both_numbers(order):
    with pytest.raises(InputError, match=r"dialogue/retrieval needs at least \d+ tokens, but --length is 100"):
        make("dialogue", replace(order, length=100))


def test_replies_end_where_the_order_says(order):
    (sample,) = make("dialogue/retrieval", replace(order, samples=1, answer_room=16))
    assert {turn.max_new_tokens for turn in sample.turns} == {17}
