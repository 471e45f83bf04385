"""Where the benchmark's texts come from, and that dev and test share nothing."""

import json
import sys
import types
from pathlib import Path

import pytest

from vestige import InputError
from vestige.bench.tasks import TaskSpec, sources


def order(split="dev", **changes) -> TaskSpec:
    return TaskSpec(count=lambda text: len(text.split()), measure=lambda turns: 0, split=split, **changes)


def folder(tmp_path: Path, number: int) -> Path:
    for i in range(number):
        (tmp_path / f"{i:02}.txt").write_text(f"Essay {i}.")
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    """Put a stand-in for the ``datasets`` package in place, and forget what was fetched."""

    def install(load_dataset) -> None:
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))

    def forget() -> None:
        for fetched in (sources._fetch_essays, sources._fetch_squad, sources._fetch_hotpot):
            fetched.cache_clear()

    forget()
    yield install
    forget()


SQUAD = {
    "data": [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": f"{title} has {i} doors.",
                    "qas": [
                        {
                            "question": f"How many doors has {title} {i}?",
                            "answers": [{"text": f"{i}"}, {"text": f"{i}"}],
                        },
                        {"question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
                for i in range(2)
            ],
        }
        for title in ("Ankh", "Brill", "Cair")
    ]
}


def hotpot(*entries) -> list[dict]:
    """Return entries given as (question, supporting titles, titles shown)."""
    return [
        {
            "question": question,
            "answer": "yes",
            "context": [[title, [f"This is {title}.", f" Yes, {title}."]] for title in shown],
            "supporting_facts": [[title, 0] for title in gold],
        }
        for question, gold, shown in entries
    ]


def written(tmp_path: Path, data) -> Path:
    path = tmp_path / "qa.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_every_fifth_essay_is_reserved_and_these_take_turns(tmp_path):
    folder(tmp_path, 22)
    assert sources.essays(order("dev", essays=tmp_path)) == ("Essay 4.", "Essay 14.")
    assert sources.essays(order("test", essays=tmp_path)) == ("Essay 9.", "Essay 19.")


def test_fewer_than_ten_essays_all_take_turns(tmp_path):
    folder(tmp_path, 9)
    assert sources.essays(order("dev", essays=tmp_path)) == tuple(f"Essay {i}." for i in (0, 2, 4, 6, 8))
    assert sources.essays(order("test", essays=tmp_path)) == tuple(f"Essay {i}." for i in (1, 3, 5, 7))


def test_a_single_essay_is_cut_in_two_at_a_space(tmp_path):
    (tmp_path / "one.txt").write_text("One two three four.")
    assert sources.essays(order("dev", essays=tmp_path)) == ("One two three",)
    assert sources.essays(order("test", essays=tmp_path)) == ("four.",)


def test_a_folder_that_gives_no_essays_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match="has no \\*.txt files"):
        sources.essays(order(essays=tmp_path))
    with pytest.raises(InputError, match="is not a folder"):
        sources.essays(order(essays=tmp_path / "absent"))
    (tmp_path / "one.txt").write_text("word")
    with pytest.raises(InputError, match="too short to be cut"):
        sources.essays(order(essays=tmp_path))
    (tmp_path / "two.txt").write_text(" ")
    with pytest.raises(InputError, match="two.txt is empty"):
        sources.essays(order("test", essays=tmp_path))


def test_essays_come_from_the_hub_when_no_folder_is_given(hub):
    asked = []
    hub(lambda *words, **options: asked.append((words, options)) or [{"text": f"Essay {i}."} for i in range(10)])
    assert sources.essays(order("dev")) == ("Essay 4.",)
    assert sources.essays(order("test")) == ("Essay 9.",)
    assert asked == [(("baber/paul_graham_essays", None), {"split": "train"})]


@pytest.mark.parametrize(
    ("read", "remedy"),
    [
        (lambda: sources.essays(order()), "give --essays DIR"),
        (lambda: sources.qa(order(), "squad"), "give --qa FILE"),
        (lambda: sources.qa(order(), "hotpot"), "give --qa FILE"),
    ],
)
def test_a_lost_connection_or_an_absent_package_names_the_option_that_needs_neither(hub, monkeypatch, read, remedy):
    def lose(*words, **options):
        raise ConnectionError("no route\nto host")

    hub(lose)
    with pytest.raises(InputError, match=f"cannot fetch .*ConnectionError: no route to host.*{remedy}"):
        read()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=f'pip install "vestige\\[bench\\]"; or {remedy}'):
        read()


def test_words_are_split_whatever_part_of_speech_they_are():
    pytest.importorskip("wonderwords")
    dev, test = sources.words("dev"), sources.words("test")
    assert not set(dev.all()) & set(test.all())
    assert abs(len(dev.all()) - len(test.all())) <= 1
    assert min(len(w) for half in (dev, test) for w in (half.nouns, half.adjectives, half.verbs)) > 300
    together = sorted({*dev.all(), *test.all()})
    assert list(dev.all()) == together[::2]
    assert not any(" " in word or word != word.lower() for word in together)


def test_an_absent_word_list_prints_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    sources.words.cache_clear()
    sources._word_lists.cache_clear()
    with pytest.raises(InputError, match='pip install "vestige\\[bench\\]"'):
        sources.words("dev")


def test_squad_articles_take_turns_and_unanswerable_questions_are_left_out(tmp_path):
    path = written(tmp_path, SQUAD)
    dev, test = (sources.qa(order(split, qa=path), "squad") for split in ("dev", "test"))
    assert (dev.source, test.source) == ("squad", "squad")
    assert test.paragraphs == ("Brill has 0 doors.", "Brill has 1 doors.")
    assert [question.question for question in dev.questions] == [
        f"How many doors has {title} {i}?" for title in ("Ankh", "Cair") for i in range(2)
    ]
    last = test.questions[-1]
    assert (last.answers, last.gold, last.near) == (("1",), ("Brill has 1 doors.",), ("Brill has 0 doors.",))


def test_paragraphs_of_a_single_article_take_turns(tmp_path):
    path = written(tmp_path, {"data": SQUAD["data"][:1]})
    assert sources.qa(order("dev", qa=path), "squad").paragraphs == ("Ankh has 0 doors.",)
    assert sources.qa(order("test", qa=path), "squad").paragraphs == ("Ankh has 1 doors.",)


def test_a_hotpot_paragraph_belongs_to_the_first_question_that_shows_it(tmp_path):
    """Question 1 loses Xi, which 0 shows first; 3 is left out, for it cannot be answered without Pi, which 2 has."""
    entries = hotpot(
        ("zero", ["Mu"], ["Mu", "Xi"]),
        ("one", ["Nu"], ["Nu", "Xi", "Tau"]),
        ("two", ["Pi", "Mu"], ["Pi", "Mu", "Rho"]),
        ("three", ["Pi"], ["Pi", "Psi"]),
    )
    path = written(tmp_path, entries)
    dev, test = (sources.qa(order(split, qa=path), "hotpot") for split in ("dev", "test"))
    assert [question.question for question in dev.questions] == ["zero", "two"]
    assert [question.question for question in test.questions] == ["one"]
    assert test.questions[0].gold == ("Nu\nThis is Nu. Yes, Nu.",)
    assert test.questions[0].near == ("Tau\nThis is Tau. Yes, Tau.",)
    assert [text.split("\n")[0] for text in dev.paragraphs] == ["Mu", "Xi", "Pi", "Rho"]
    assert [text.split("\n")[0] for text in test.paragraphs] == ["Nu", "Tau", "Psi"]


def test_without_supporting_facts_all_paragraphs_of_a_hotpot_question_are_gold(tmp_path):
    entries = hotpot(("zero", [], ["Mu", "Xi"]))
    del entries[0]["supporting_facts"]
    found = sources.qa(order("dev", qa=written(tmp_path, entries)), "hotpot")
    assert [text.split("\n")[0] for text in found.questions[0].gold] == ["Mu", "Xi"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"data": [\n}', "is not JSON: line 2, column 1"),
        ({"rows": []}, "neither SQuAD's format .* nor HotpotQA's"),
        ({"data": {}}, "expected 'data' to be a list, got dict"),
        ({"data": [3]}, r"data\[0\]: expected an object with 'paragraphs', got int"),
        (
            {"data": [{"paragraphs": [{"qas": []}]}]},
            r"data\[0\].paragraphs\[0\]: expected 'context' to be a str",
        ),
        (
            {"data": [{"paragraphs": [{"context": "x", "qas": [{"question": "?", "answers": []}]}]}]},
            r"data\[0\].paragraphs\[0\].qas\[0\]: an answerable question needs answers",
        ),
        ([{"question": "?", "answer": ""}], r"\[0\]: the answer is empty"),
        ([{"question": "?", "answer": "x", "context": [["title"]]}], r"\[0\].context\[0\]: expected \[title"),
        ([{"question": "?", "answer": "x", "context": [], "supporting_facts": [3]}], r"\[0\].supporting_facts"),
        ([], "has no question for the dev split"),
    ],
)
def test_a_malformed_file_is_named_with_the_place(tmp_path, data, message):
    with pytest.raises(InputError, match=f"qa.json.*{message}") as error:
        sources.qa(order(qa=written(tmp_path, data)), "squad")
    assert "\n" not in str(error.value)


def test_both_sets_from_the_hub_are_read_like_their_files(hub):
    squad = [
        {"title": t, "context": f"{t} rests.", "question": f"Who rests as {t}?", "answers": {"text": [t]}}
        for t in ("Ode", "Una")
    ]
    shown = {"title": ["Mu", "Xi"], "sentences": [["This is Mu."], ["This is Xi."]]}
    facts = {"title": ["Xi"], "sent_id": [0]}
    rows = {
        "rajpurkar/squad": squad,
        "hotpotqa/hotpot_qa": [{"question": "?", "answer": "Xi", "context": shown, "supporting_facts": facts}],
    }
    asked = []
    hub(lambda name, config, split: asked.append((name, config, split)) or rows[name])
    found = sources.qa(order("test"), "squad")
    assert (found.source, found.paragraphs, found.questions[0].answers) == ("squad", ("Una rests.",), ("Una",))
    found = sources.qa(order("dev"), "hotpot")
    assert (found.source, found.questions[0].gold) == ("hotpot", ("Xi\nThis is Xi.",))
    assert asked == [("rajpurkar/squad", None, "validation"), ("hotpotqa/hotpot_qa", "distractor", "validation")]
