"""Drafts for the eraser's trainer: what is erased, what is asked, and that no benchmark's words are among them."""

import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from vestige.bench.erasing import stories, tasks
from vestige.bench.tasks import TaskSpec
from vestige.training.data import vocabulary
from vestige.training.data.sentences import split_sentences
from vestige.training.data.vocabulary import RELATIONS
from vestige.training.eraser.facts import KINDS, draft_facts
from vestige.training.eraser.quotations import draft_altered, draft_neighbour

PROSE = [f"Sentence number {i} says that the calm year {1000 + 7 * i} was good for Alice." for i in range(16)]
OTHER = [f"Strange words {i} stand here for no reason at all, says Rupert to {i + 50} men." for i in range(6)]


def drafts(number: int = 120):
    return [draft_facts(random.Random(i), PROSE) for i in range(number)]


def count(text: str) -> int:
    return len(text.split())


def side(draft, *, is_erased: bool) -> list[str]:
    return [passage.text for passage in draft.passages if passage.is_erased == is_erased]


def clean(draft) -> str:
    return draft.joint.join(side(draft, is_erased=False))


# Statements.


def test_every_kind_comes_and_its_spans_are_the_passages_that_are_gone():
    made = drafts()
    assert Counter(one.queries[0].kind for one in made).keys() == KINDS.keys()
    assert {one.joint for one in made} == {" ", "\n", "\n\n"}
    for one in made:
        erased = one.joint.join(one.text[start:end] for start, end in one.spans)
        assert erased == one.joint.join(side(one, is_erased=True)) != ""
        main = one.queries[0]
        assert main.answer in clean(one) and (main.kind == "alone") == (main.answer == "")


def test_what_is_erased_contradicts_commands_or_has_nothing_to_do_with_the_answer():
    for one in drafts():
        kind, answer = one.queries[0].kind, one.queries[0].answer
        stated = [passage.states for passage in one.passages if passage.is_erased and passage.states]
        expected = {"conflict": 1, "remark": 1, "order": 0, "retained": 0, "alone": 1}
        assert len(stated) == expected.get(kind, len(stated)) and answer not in stated
        assert kind != "several" or len(stated) in (2, 3)
        assert one.queries[0].misled == (kind != "retained")


def test_a_remark_on_what_is_erased_stays_right_behind_it():
    one = next(draft for draft in drafts() if draft.queries[0].kind == "remark")
    at = next(i for i, passage in enumerate(one.passages) if passage.is_erased)
    follows = one.passages[at + 1]
    assert not follows.is_erased and one.passages[at].states not in follows.text
    assert any(re.fullmatch(pattern(form), follows.text) for form in vocabulary.REMARKS)


def test_what_somebody_else_has_is_asked_for_too_and_everything_about_a_conflict():
    for one in drafts():
        kinds = [query.kind for query in one.queries[1:]]
        assert kinds[0] == "retained" and ("all" in kinds) == (one.queries[0].kind in ("conflict", "several"))
        assert not any(query.misled for query in one.queries[1:])


def test_often_it_is_asked_with_nothing_that_opens_the_reply_too():
    drafts = [draft_facts(random.Random(i), PROSE) for i in range(100)]
    free = [one for draft in drafts for one in draft.queries[1:] if not one.prefix]
    assert 30 < len(free) < 70 and {one.kind for one in free} == {"free"}
    assert all(draft.queries[0].prefix for draft in drafts)


def test_a_conflict_can_be_erased_either_way():
    one = next(draft for draft in drafts() if draft.queries[0].kind == "conflict")
    other = one.flipped()
    assert other.text == one.text and other.queries[0].answer != one.queries[0].answer and other.flipped() == one
    assert next(draft for draft in drafts() if draft.queries[0].kind == "order").flipped() is None


def test_the_same_seed_gives_the_same_text():
    assert drafts(5) == drafts(5) and draft_facts(random.Random(1), PROSE) != draft_facts(random.Random(2), PROSE)


# Quotations.


def test_a_quotation_goes_on_behind_its_anchor_in_the_clean_text():
    for seed in range(20):
        one = draft_neighbour(random.Random(seed), PROSE, OTHER)
        assert [query.kind for query in one.queries] == ["across", "elsewhere"]
        for query in one.queries:
            assert f"{query.prefix} {query.answer}" in clean(one) and query.verbatim
        (span,) = one.spans
        before = one.text[: span[0]].rstrip()
        assert before.endswith(one.queries[0].prefix) and not before.endswith(one.queries[1].prefix)


def test_an_altered_sentence_differs_by_a_name_or_a_number_and_is_erased():
    for seed in range(40):
        one = draft_altered(random.Random(seed), PROSE, OTHER)
        assert one is not None
        main = one.queries[0]
        (is_erased,) = (passage for passage in one.passages if passage.is_erased and passage.states)
        (kept,) = (passage for passage in one.passages if not passage.is_erased and passage.states)
        assert f"{main.prefix} {main.answer}" in kept.text and f"{main.prefix} {is_erased.states}" in is_erased.text
        assert is_erased.states != main.answer == kept.states and is_erased.text != kept.text
        assert one.flipped().queries[0].answer == is_erased.states


def test_prose_without_names_and_numbers_cannot_be_altered():
    assert draft_altered(random.Random(0), ["there is nothing in here that has a name, or counts."] * 8, OTHER) is None


def test_sentences_are_cut_at_their_ends_and_rubbish_is_left_out():
    text = "One sentence stands here alone.  Another\none follows it now! Short. " + "x" * 500 + "."
    assert split_sentences(text) == ["One sentence stands here alone.", "Another one follows it now!"]


# What benchmarks say must not be learnt.


def pattern(form: str) -> str:
    """Return a pattern for all that a form can say."""
    return re.sub(r"\\{\w+\\}", ".+", re.escape(form))


def test_nothing_is_about_what_benchmarks_ask_for():
    values = {value for _, listed in stories.HABITS for value in listed}
    ours = {*vocabulary.COLOURS, *vocabulary.CITIES, *vocabulary.FOODS, *vocabulary.JOBS}
    assert not ours & values
    assert not {*vocabulary.FIRST, *vocabulary.SURNAMES} & {*stories.PEOPLE}
    kinds = {*(kind for kind, _ in stories.HABITS), "favourite", "stock", "door", "locker", "badge", "magic"}
    assert not kinds & {word for relation in RELATIONS for word in relation.what.split()}


@pytest.fixture(scope="module")
def essays(tmp_path_factory) -> Path:
    """Write essays that say nothing."""
    folder = tmp_path_factory.mktemp("essays")
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(
            " ".join(f"Day {n} of year {i} went by like all others." for n in range(90))
        )
    return folder


@pytest.mark.parametrize(
    "name", ["needles_early", "several_spans", "tool_result", "injection", "preference", "derived_0"]
)
def test_no_statement_order_question_or_reply_is_phrased_like_a_benchmarks(essays, name):
    pytest.importorskip("wonderwords")
    order = TaskSpec(count=count, measure=lambda turns: sum(count(t.context) for t in turns), length=900, essays=essays)
    forms = [pattern(form) for form in (*vocabulary.STATED, *vocabulary.ORDERS, *vocabulary.REMARKS)]
    asked = [pattern(form) for form in (*vocabulary.ASK, *vocabulary.ASK_ALL, *vocabulary.REPLY, *vocabulary.REPLY_ALL)]
    for sample in islice(tasks.make(name, order), 3):
        for start, end in sample.passages:
            assert not [form for form in forms if re.fullmatch(form, sample.context[start:end])]
        for question in sample.questions:
            said = (question.text, question.answer_prefix)
            assert not [form for form in asked for one in said if re.fullmatch(form, one)]
