"""Cases: the user's own JSONL, what is taken of it, and what is wrong with a line."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from vestige import InputError
from vestige.bench.sample import Sample, Turn
from vestige.bench.tasks import TaskSpec, make


def words(text: str) -> int:
    return len(text.split())


def measure(turns: Sequence[Turn]) -> int:
    return sum(words(f"{t.context} {t.question} {t.answer_prefix}") + t.max_new_tokens for t in turns)


def case(**changes) -> dict:
    return {"task": "lamps", "context": "Ada keeps lamp 4.", "question": "Who?", "answer": ["Ada"]} | changes


@pytest.fixture
def read(tmp_path):
    """Write lines to a file and read its cases."""

    def call(*lines: object, name: str = "cases", **changes) -> list[Sample]:
        path = tmp_path / "cases.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return make(name, TaskSpec(**({"count": words, "measure": measure, "file": path} | changes)))

    return call


def picked(samples: Sequence[Sample]) -> list[tuple[str, int, int]]:
    return [(s.task, s.length, s.index) for s in samples]


def test_a_case_is_one_turn_with_defaults(read):
    (sample,) = read(case(length=2048))
    turn = Turn(context="Ada keeps lamp 4.", question="Who?", answers=("Ada",))
    assert sample == Sample(task="lamps", index=1, length=2048, turns=(turn,))
    assert turn.metric == "contains" and turn.max_new_tokens == 64


def test_everything_a_case_can_say_is_taken_over(read):
    said = {"answer": "Ada", "answer_prefix": "It is", "metric": "classification", "choices": ["Ada", "Bo"]}
    (sample,) = read(case(**said, max_new_tokens=7))
    (turn,) = sample.turns
    assert turn.answers == ("Ada",) and turn.answer_prefix == "It is" and turn.max_new_tokens == 7
    assert turn.metric == "classification" and turn.choices == ("Ada", "Bo")


def test_a_dialogue_has_turns(read):
    later = {"question": "And lamp 5?", "answer": "Bo", "metric": "f1"}
    turns = [{"context": "Ada keeps lamp 4.", "question": "Who?", "answer": "Ada"}, later]
    (sample,) = read({"task": "talk", "length": 99, "turns": turns})
    assert [t.question for t in sample.turns] == ["Who?", "And lamp 5?"]
    assert [t.context for t in sample.turns] == ["Ada keeps lamp 4.", ""]
    assert [t.metric for t in sample.turns] == ["contains", "f1"]


def test_without_a_length_a_task_has_that_of_its_longest_case(read):
    long = case(context="a b c d e f")
    samples = read(case(), long, case(task="other"), case(length=5))
    # 6 words + 1 of the question + 64 of the reply = 71; "Ada keeps lamp 4." has 4: 69
    assert picked(samples) == [("lamps", 5, 4), ("lamps", 71, 1), ("lamps", 71, 2), ("other", 69, 3)]


def test_a_length_takes_the_cases_that_say_it_and_those_that_fit(read):
    lines = (case(length=100), case(length=70), case(), case(context="a b c d e f"))
    assert picked(read(*lines, length=70)) == [("lamps", 70, 2), ("lamps", 70, 3)]
    assert picked(read(*lines, length=100)) == [("lamps", 100, 1), ("lamps", 100, 3), ("lamps", 100, 4)]
    with pytest.raises(InputError, match=r"cases\.jsonl has no case of length 60; there are 69, 70, 71, 100"):
        read(*lines, length=60)


def test_samples_are_the_first_of_each_task_and_length(read):
    lines = [case(length=9), case(length=9), case(length=9), case(length=8), case(task="b", length=9)]
    assert picked(read(*lines, samples=2)) == [("b", 9, 5), ("lamps", 8, 4), ("lamps", 9, 1), ("lamps", 9, 2)]


def test_a_part_is_a_task_of_the_file(read):
    lines = (case(length=9), case(task="a/b", length=9))
    assert picked(read(*lines, name="cases/a/b")) == [("a/b", 9, 2)]
    with pytest.raises(InputError, match=r"unknown task of .*cases\.jsonl 'lamp'; did you mean 'lamps'\?"):
        read(*lines, name="cases/lamp")


def test_both_splits_have_all_cases(read):
    assert read(case(), split="dev") == read(case(), split="test")


def test_blank_lines_are_skipped_and_counted(read):
    assert picked(read("", case(length=9), "  ", case(length=9), "")) == [("lamps", 9, 2), ("lamps", 9, 4)]


def test_replies_end_beyond_the_answers_if_there_is_an_answer_room(read):
    both = ["one", "one two three"]
    all_wanted, any_wanted = (read(case(answer=both, metric=m), answer_room=16)[0] for m in ("contains", "f1"))
    assert all_wanted.turns[0].max_new_tokens == 4 + 16  # "one, one two three"
    assert any_wanted.turns[0].max_new_tokens == 3 + 16


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"line 2: not JSON"),
        ('"text"', r'line 2: not a JSON object but "text"'),
        (case(anwser="x"), r"line 2: unknown key 'anwser'; did you mean 'answer'\?"),
        (case(metric="exakt"), r"line 2: unknown metric 'exakt'; did you mean 'exact'\?"),
        (case(metric=3), r"line 2: 'metric' is not a text but 3"),
        (case(metric="classification"), r"line 2: the metric classification needs 'choices'"),
        (case(task=" "), r"line 2: 'task' is empty"),
        (case(context=""), r"line 2: 'context' is empty"),
        (case(question=["a"]), r"line 2: 'question' is not a text but \[\"a\"\]"),
        (case(answer=[]), r"line 2: 'answer' is not a list of texts but \[\]"),
        (case(answer=["Ada", 4]), r"line 2: 'answer' is not a list of texts"),
        (case(answer=["Ada", ""]), r"line 2: 'answer' has an empty text"),
        (case(length=0), r"line 2: 'length' is not a whole number above 0 but 0"),
        (case(length=True), r"line 2: 'length' is not a whole number above 0 but true"),
        (case(length=2.5), r"line 2: 'length' is not a whole number above 0 but 2.5"),
        (case(max_new_tokens=-1), r"line 2: 'max_new_tokens' is not a whole number above 0 but -1"),
        ({"task": "a", "context": "b", "question": "c"}, r"line 2: 'answer' is missing"),
        ({"context": "b", "question": "c", "answer": "d"}, r"line 2: 'task' is missing"),
        ({"task": "a", "turns": []}, r"line 2: 'turns' is not a list of at least one turn"),
        ({"task": "a", "turns": [], "question": "b"}, r"line 2: unknown key 'question'"),
        ({"task": "a", "turns": [{"question": "b", "answer": "c"}]}, r"line 2, turn 1: 'context' is missing"),
        ({"task": "a", "turns": [case()]}, r"line 2, turn 1: unknown key 'task'"),
        ('{"task": "\\ud800", "context": "a", "question": "b", "answer": "c"}', r"line 2: 'task' has half a char"),
    ],
)
def test_a_malformed_line_is_named(read, line, said):
    with pytest.raises(InputError, match=said) as raised:
        read(case(), line)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    def read(path: Path | None) -> list[Sample]:
        return make("cases", TaskSpec(count=words, measure=measure, file=path))

    with pytest.raises(InputError, match=r"cases needs a file: vestige bench cases FILE\.jsonl"):
        read(None)
    with pytest.raises(InputError, match=r"no such file"):
        read(tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"empty\.jsonl is empty"):
        read(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(InputError, match=r"not UTF-8 text"):
        read(tmp_path / "latin.jsonl")
