"""Questions for the eraser's trainer: read from files, split by paragraph, with a distractor that is erased."""

import json
import random

import pytest

from vestige import InputError
from vestige.training.eraser.questions import Question, draft_distractor, read_questions, split_questions

TOWNS = ("Arlen", "Bantry", "Corsham", "Dunmore", "Elgin", "Fowey", "Goole", "Hythe")
ASKED = [
    Question(
        text=f"Who founded {town}?",
        paragraph=f"The town of {town} lies by the sea. It was founded by Lady {town}wen long ago. It often rains.",
        answer=f"Lady {town}wen",
    )
    for town in TOWNS
]


def lines(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def row(answers, context="Rome was founded by Romulus."):
    return {"question": " Who founded Rome? ", "context": context, "answers": answers}


@pytest.mark.parametrize("answers", ["Romulus", ["Remus", "Romulus"], {"text": ["Romulus"], "answer_start": [20]}])
def test_answers_are_a_text_a_list_or_squads(tmp_path, answers):
    (one,) = read_questions([lines(tmp_path / "qa.jsonl", row(answers))])
    assert one == Question(text="Who founded Rome?", paragraph="Rome was founded by Romulus.", answer="Romulus")


def test_questions_whose_answer_does_not_stand_there_are_left_out_and_some_must_be_left(tmp_path):
    assert len(read_questions([lines(tmp_path / "qa.jsonl", row("Remus"), row("Romulus"))])) == 1
    with pytest.raises(InputError, match="has an answer that stands"):
        read_questions([lines(tmp_path / "none.jsonl", row("Remus"))])
    assert read_questions([]) == []


@pytest.mark.parametrize(("columns", "said"), [({"question": "?"}, "context"), (row([]), "answers")])
def test_a_line_without_its_fields_is_told_with_its_place(tmp_path, columns, said):
    with pytest.raises(InputError, match=f"line 1.*{said}"):
        read_questions([lines(tmp_path / "qa.jsonl", columns)])


def test_benchmarks_and_other_files_are_refused(tmp_path):
    (tmp_path / "squad.json").write_text(json.dumps({"data": []}))
    (tmp_path / "a.txt").write_text("text")
    for name, said in (("squad.json", "benchmarks only"), ("a.txt", "jsonl"), ("gone.jsonl", "gone")):
        with pytest.raises(InputError, match=said):
            read_questions([tmp_path / name])


def test_questions_about_one_paragraph_are_on_one_side():
    twice = [*ASKED, *ASKED]
    train, held = split_questions(twice, share=0.4)
    assert len(train) + len(held) == len(twice) and train and held
    assert not {one.paragraph for one in train} & {one.paragraph for one in held}


def test_the_distractor_is_the_right_sentence_with_another_answer_in_it():
    for seed in range(20):
        draft = draft_distractor(random.Random(seed), ASKED, 300)
        (query,), (is_erased,) = draft.queries, [one for one in draft.passages if one.is_erased]
        (kept,) = (one for one in draft.passages if one.states and not one.is_erased)
        assert query.answer == kept.states in kept.text and query.misled
        assert is_erased.text == kept.text.replace(query.answer, is_erased.states) != kept.text
        clean = " ".join(one.text for one in draft.passages if not one.is_erased)
        assert query.answer in clean and len(draft.text) > 300
        assert draft.flipped().queries[0].answer == is_erased.states


def test_without_another_answer_there_is_no_distractor():
    assert draft_distractor(random.Random(0), ASKED[:1], 300) is None
