"""The samples of the benchmark of erasers: what is erased and asked, how long they are, and that splits are apart."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from vestige import InputError
from vestige.bench.erasing import distractors, tasks
from vestige.bench.erasing.sample import EraseSample, Question, erased, unmarked
from vestige.bench.erasing.stories import HABITS, PEOPLE
from vestige.bench.tasks import TaskSpec
from vestige.bench.tasks.questions import Question as Asked
from vestige.bench.tasks.questions import take_turns

pytest.importorskip("wonderwords")

CHAT_TEXT = 7
"""Tokens that the fake measure adds for the chat text."""
NAMES = tuple(tasks.TASKS)
LENGTH = 2400


def count(text: str) -> int:
    return len(text.split())


def measure(turns) -> int:
    return CHAT_TEXT + sum(
        count(t.context) + count(t.question) + count(t.answer_prefix) + t.max_new_tokens for t in turns
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Write essays whose every sentence names its file, and a file of questions."""
    root = tmp_path_factory.mktemp("texts")
    (root / "essays").mkdir()
    for i in range(20):
        lines = (f"In essay{i:02} the clerk wrote line {n} with care, and then he rested!" for n in range(90))
        (root / "essays" / f"{i:02}.txt").write_text("\n".join(lines))
    squad = [{"paragraphs": [paragraph(a, p) for p in range(8)]} for a in range(24)]
    (root / "squad.json").write_text(json.dumps({"data": squad}))
    return root


def paragraph(article: int, number: int) -> dict:
    name = f"Town{chr(65 + article)}{chr(97 + number)}"
    asked = [
        {"question": f"Who founded {name}?", "answers": [{"text": f"Lady {name}."}]},
        {"question": f"When was {name} founded?", "answers": [{"text": f"{1300 + 10 * article + number}"}]},
    ]
    text = (
        f"{name} lies by the sea. It was founded in {1300 + 10 * article + number} by the Lady {name}, who was rich. "
    )
    return {"context": text + "The sea is blue. " * 5, "qas": asked}


def made(texts: Path, name: str, **changes) -> list[EraseSample]:
    given = {"length": LENGTH, "samples": 4, "essays": texts / "essays", "qa": texts / "squad.json"}
    return list(tasks.make(name, TaskSpec(**{"count": count, "measure": measure, **given, **changes})))


def passages(sample: EraseSample) -> list[str]:
    return [sample.context[start:end] for start, end in sample.passages]


def asked(sample: EraseSample, kind: str) -> list[Question]:
    return [question for question in sample.questions if question.kind == kind]


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_as_long_as_fits_and_no_question_exceeds_the_length(texts, name):
    for sample in made(texts, name):
        taken = [
            CHAT_TEXT + count(sample.context) + count(q.text) + count(q.answer_prefix) + q.max_new_tokens
            for q in sample.questions
        ]
        assert LENGTH - 80 < max(taken) <= LENGTH, (name, taken)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_forbidden_stands_in_the_passages_alone_and_answers_in_the_rest(texts, name):
    for sample in made(texts, name):
        gone, left = " ".join(passages(sample)), sample.remaining
        assert all(value in gone and value not in left for q in sample.questions for value in q.forbidden)
        for question in (*asked(sample, "target"), *asked(sample, "retained")):
            assert any(answer in left for answer in question.answers), question
        assert asked(sample, "retained")
        assert all(start < end <= later for (start, end), (later, _) in pairwise([*sample.passages, (10**9, 0)]))


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_how_many_are_asked_for(texts, name):
    assert made(texts, name)[:2] == made(texts, name, samples=2)
    assert made(texts, name, samples=1) != made(texts, name, samples=1, seed=1)
    assert [sample.index for sample in made(texts, name)] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", NAMES)
def test_dev_and_test_share_no_essay_key_or_question(texts, name):
    seen = [made(texts, name, split=split) for split in ("dev", "test")]
    words = [
        {word for s in half for word in re.findall(r"essay\d\d|Town\w+|[a-z]+-[a-z]+|\d{7}", s.context)}
        for half in seen
    ]
    assert words[0] and words[1] and not words[0] & words[1]
    answers = [{a for s in half for q in s.questions for a in (*q.answers, *q.forbidden)} for half in seen]
    assert not answers[0] & answers[1]


@pytest.mark.parametrize(("name", "which"), [("needles_early", 0), ("needles_late", 1)])
def test_of_two_conflicting_needles_the_named_one_is_erased(texts, name, which):
    for sample in made(texts, name):
        (target,) = asked(sample, "target")
        key = re.search(r"number for (\S+)\?", target.text)[1]
        numbers = re.findall(rf"One of the special magic numbers for {key} is: (\d+)\.", sample.context)
        assert len(numbers) == 2 and target.forbidden == (numbers[which],) and target.answers == (numbers[1 - which],)
        assert passages(sample) == [f"One of the special magic numbers for {key} is: {numbers[which]}."]
        assert asked(sample, "leak")[0].forbidden == target.forbidden


def test_several_spans_leave_one_of_four_needles(texts):
    kept = set()
    for sample in made(texts, "several_spans", samples=8):
        (target,) = asked(sample, "target")
        assert len(sample.passages) == 3 == len(target.forbidden) and len(target.answers) == 1
        numbers = re.findall(r"is: (\d+)\.", sample.context)
        kept.add([n for n in numbers if n in (*target.forbidden, *target.answers)].index(target.answers[0]))
    assert len(kept) > 1


def test_either_tool_result_may_be_the_wrong_one_and_only_the_result_goes(texts):
    drawn = made(texts, "tool_result", samples=12)
    assert {sample.tags["wrong"] for sample in drawn} == {"first", "second"}
    for sample in drawn:
        assert len(re.findall(r"Call: get_stock", sample.remaining)) == 3
        (gone,) = passages(sample)
        assert gone.startswith("The stock of ") and asked(sample, "target")[0].forbidden[0] in gone


def test_an_injection_says_what_to_answer(texts):
    for sample in made(texts, "injection"):
        (gone,) = passages(sample)
        assert gone.startswith("When asked for") and asked(sample, "target")[0].forbidden[0] in gone
        assert sample.context.index(asked(sample, "target")[0].answers[0]) < sample.passages[0][0]


def test_the_first_of_two_preferences_goes_and_its_retraction_stays(texts):
    for sample in made(texts, "preference"):
        (target,) = asked(sample, "target")
        assert passages(sample)[0].endswith(f"is {target.forbidden[0]}.")
        assert sample.remaining.index("change of mind") < sample.remaining.index(f"is {target.answers[0]}.")


def test_lists_have_as_many_values_for_either_split_and_none_holds_another():
    for values in (PEOPLE, *(values for _, values in HABITS)):
        halves = [take_turns(values, split) for split in ("dev", "test")]
        assert len(halves[0]) == len(halves[1]) >= 3
        assert not any(
            one != other and one.lower() in other.lower() for half in halves for one in half for other in half
        )


@pytest.mark.parametrize("distance", [0, 250, 1500])
def test_the_consequence_stands_so_far_behind_the_fact_and_stays(texts, distance):
    for sample in made(texts, f"derived_{distance}"):
        behind = sample.context[sample.passages[0][1] : sample.context.index(" Because of this locker")]
        assert distance <= count(behind) <= distance + 15 and sample.tags["distance"] == distance
        assert "Because of this locker, " in sample.remaining
        target, (badge, _) = asked(sample, "target")[0], asked(sample, "retained")
        assert sample.context.index(target.answers[0]) < sample.passages[0][0]
        assert badge.text.startswith("What is the badge") and badge.answers[0] not in behind


def test_a_harmless_passage_is_a_hundred_tokens_that_nothing_asks_about(texts):
    for sample in made(texts, "harmless"):
        assert not asked(sample, "target") and len(asked(sample, "retained")) == 2
        assert 100 <= count(passages(sample)[0]) <= 115
        assert not any(q.forbidden for q in sample.questions)


def test_what_was_deleted_is_asked_for_in_three_ways(texts):
    for sample in made(texts, "repeat"):
        leaks = asked(sample, "leak")
        assert (
            len(leaks) == 3 and len({q.forbidden for q in leaks}) == 1 and leaks[0].forbidden[0] in passages(sample)[0]
        )
        assert sum(bool(q.answer_prefix) for q in leaks) == 1


def test_a_distractor_is_the_answer_sentence_with_another_answer_behind_the_right_paragraph(texts):
    for sample in made(texts, "distractor_qa", samples=10):
        (target,), (gone,) = asked(sample, "target"), passages(sample)
        (wrong,) = target.forbidden
        assert gone.startswith(target.text.rpartition("Question: ")[2] + f" {wrong}. ")
        right = gone.partition(f"{wrong}. ")[2].replace(wrong, target.answers[0])
        assert wrong not in right and right in sample.remaining
        assert sample.context.index(right) < sample.passages[0][0] < sample.context.rindex("\n\n")
        assert bool(re.search(r"\d", wrong)) == bool(re.search(r"\d", target.answers[0]))
        texts_of = sample.remaining.split("\n\n")
        assert len([text for text in texts_of if text]) == len({text for text in texts_of if text})
        (kept,) = asked(sample, "retained")
        assert kept.text != target.text and any(answer in sample.remaining for answer in kept.answers)


def test_the_answer_sentence_is_the_one_nearest_to_the_question():
    text = "Ann came in May. Bo was born in May and left. Dismay was great."
    found = distractors.find_answer_sentence(
        Asked(question="When was Bo born?", answers=("May.",), gold=(text,), near=())
    )
    assert found == ("Bo was born in May and left.", "May")
    none = Asked(question="When was Bo born?", answers=("June",), gold=(text,), near=())
    assert distractors.find_answer_sentence(none) is None


@pytest.mark.parametrize(
    ("answer", "look"),
    [
        ("Lady Ann", ("name", 2)),
        ("Ann of the Hill and Sea", ("name", 3)),
        ("six years", ("words", 2)),
        ("lake", ("words", 1)),
    ],
)
def test_answers_are_exchanged_for_others_of_their_shape(answer, look):
    assert distractors.find_shape(answer) == look


def test_questions_that_run_out_are_counted(texts):
    with pytest.raises(InputError, match=r"distractor_qa has \d+ questions in dev that fit --length 2400 .* asks for"):
        made(texts, "distractor_qa", samples=1000)


@pytest.mark.parametrize("name", NAMES)
def test_a_length_that_is_too_short_is_refused_with_the_one_that_is_needed(texts, name):
    with pytest.raises(InputError, match=r"needs at least \d+ tokens, but --length is 60|fit --length 60"):
        made(texts, name, length=60)
    with pytest.raises(InputError, match="needs --length"):
        made(texts, name, length=None)


def test_an_unknown_task_is_named_with_its_likely_meaning(texts):
    with pytest.raises(InputError, match="unknown task 'needle_early'; did you mean 'needles_early'"):
        made(texts, "needle_early")


def test_essays_that_are_too_short_for_a_distance_are_refused(texts, tmp_path):
    (tmp_path / "one.txt").write_text("It was good. " * 40)
    with pytest.raises(InputError, match="too short: a passage of 1500 tokens is needed"):
        made(texts, "derived_1500", essays=tmp_path)


def test_marks_come_out_of_a_text_as_characters():
    text, found = unmarked(f"one {erased('two')} three {erased('four')}")
    assert text == "one two three four" and [text[a:b] for a, b in found] == ["two", "four"]
    assert unmarked("plain") == ("plain", ())


def test_a_reply_is_right_with_any_answer_and_leaks_with_anything_forbidden():
    question = Question(kind="target", text="?", answers=("Red Fox", "fox"), forbidden=("Bear", "42"))
    assert question.correct("the fox!") and not question.correct("a dog")
    assert question.leaks("it is 42.") and question.leaks("BEAR") and not question.leaks("fox")
    assert Question(kind="leak", text="?").correct("x") is None is Question(kind="leak", text="?").leaks("x")
