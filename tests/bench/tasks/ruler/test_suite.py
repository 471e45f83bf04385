"""RULER's thirteen tasks: the right words, the right counts, answers that can be found, never too long."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

from vestige import InputError
from vestige.bench.sample import Sample, Turn
from vestige.bench.tasks import TaskSpec, make
from vestige.bench.tasks.fitting import largest
from vestige.bench.tasks.ruler import needles
from vestige.bench.tasks.ruler.suite import PARTS

pytest.importorskip("wonderwords")

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORDS = r"[a-z]\S*-\S*[a-z]"
FORMS = {"words": WORDS, "numbers": r"[1-9]\d{6}", "uuids": UUID}
CHAT_TEXT = 7
"""Tokens that the fake measure adds for the chat text."""


def count(text: str) -> int:
    return len(text.split())


def measure(turns) -> int:
    return CHAT_TEXT + sum(
        count(t.context) + count(t.question) + count(t.answer_prefix) + t.max_new_tokens for t in turns
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Write essays whose every sentence names its file, and two question files."""
    root = tmp_path_factory.mktemp("texts")
    (root / "essays").mkdir()
    for i in range(20):
        lines = (f"In essay{i:02} the clerk wrote line {n} with care, and then he rested!" for n in range(30))
        (root / "essays" / f"{i:02}.txt").write_text("\n".join(lines))
    squad = [{"paragraphs": [paragraph(a, p) for p in range(6)]} for a in range(24)]
    (root / "squad.json").write_text(json.dumps({"data": squad}))
    (root / "hotpot.json").write_text(json.dumps([hotpot_entry(i) for i in range(40)]))
    return root


def paragraph(article: int, number: int) -> dict:
    name = f"Town{article}x{number}"
    asked = {"question": f"Who founded {name}?", "answers": [{"text": f"Lady {name}"}, {"text": f"the Lady {name}"}]}
    return {"context": f"{name} was founded by the Lady {name}. " + "It is by the sea. " * 5, "qas": [asked]}


def hotpot_entry(i: int) -> dict:
    shown = [[f"Peak{i}n{j}", [f"Peak{i}n{j} is high.", f" It lies in Land{i}."]] for j in range(10)]
    facts = [[f"Peak{i}n3", 0], [f"Peak{i}n7", 1]]
    question = f"Where do Peak{i}n3 and Peak{i}n7 lie?"
    return {"question": question, "answer": f"Land{i}", "context": shown, "supporting_facts": facts}


def order(texts: Path, **changes) -> TaskSpec:
    given = {"length": 1200, "samples": 3, "essays": texts / "essays", "qa": texts / "squad.json"}
    return TaskSpec(**{"count": count, "measure": measure, **given, **changes})


def qa_file(part: str) -> str:
    return "hotpot.json" if part == "qa_2" else "squad.json"


def part(texts: Path, name: str, **changes) -> list[Sample]:
    return make(f"ruler/{name}", order(texts, qa=texts / qa_file(name), **changes))


def turn_of(sample: Sample) -> Turn:
    (turn,) = sample.turns
    return turn


def needle_pairs(turn: Turn) -> list[tuple[str, str]]:
    """Return every (key, value) of a context, in order."""
    return re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.(?=\s|$)", turn.context)


def test_there_are_thirteen_parts_and_a_wrong_one_is_answered_with_the_list(texts):
    assert len(PARTS) == 13
    with pytest.raises(InputError, match="unknown part of ruler 'niah_singel_1'; did you mean 'niah_single_1'.*qa_2"):
        make("ruler/niah_singel_1", order(texts))


def test_all_of_ruler_is_every_part_with_its_own_rows(texts):
    found = make("ruler", order(texts, samples=2))
    assert [(s.task, s.index) for s in found] == [(f"ruler/{name}", i) for name in PARTS for i in range(2)]
    assert {turn.metric for s in found for turn in s.turns} == {"string_match_all", "string_match_part"}


def test_twenty_samples_are_made_unless_told(texts):
    assert len(part(texts, "vt", samples=None)) == 20


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("length", [1024, 1999])
def test_no_sample_is_longer_than_asked_and_none_is_much_shorter(texts, name, length):
    """The longest unit of any haystack here is a line of noise or a document: fewer than 40 tokens by this measure."""
    for sample in part(texts, name, length=length):
        assert sample.length == length
        assert length - 40 < measure(sample.turns) <= length


@pytest.mark.parametrize("name", PARTS)
def test_too_short_a_length_is_refused_with_both_numbers(texts, name):
    with pytest.raises(InputError, match=r"ruler/.* \d\d+ tokens.*, fewer|ruler/.* at least \d+ tokens, .* is 40"):
        part(texts, name, length=40)


def test_the_length_must_be_given(texts):
    with pytest.raises(InputError, match="ruler needs --length"):
        make("ruler", order(texts, length=None))


@pytest.mark.parametrize("name", PARTS)
def test_a_sample_follows_from_seed_split_and_index_alone(texts, name):
    two, four = (part(texts, name, samples=n) for n in (2, 4))
    assert two == four[:2]
    assert len({turn_of(sample).context for sample in four}) == 4
    for changes in ({"seed": 1}, {"split": "test"}):
        assert not {turn_of(s).context for s in part(texts, name, **changes)} & {turn_of(s).context for s in four}


@pytest.mark.parametrize(
    ("name", "limit"),
    [(n, 128) for n in needles.NEEDLES] + [("vt", 30), ("cwe", 120), ("fwe", 50), ("qa_1", 32), ("qa_2", 32)],
)
def test_replies_are_as_long_as_in_ruler_unless_room_is_given(texts, name, limit):
    assert turn_of(part(texts, name)[0]).max_new_tokens == limit
    turn = turn_of(part(texts, name, answer_room=16)[0])
    wanted = 20 if name == "cwe" else max(map(count, turn.answers)) if "qa" in name else len(turn.answers)
    assert turn.max_new_tokens == wanted + 16  # cwe's reply has a number before each word


@pytest.mark.parametrize(("name", "form"), needles.NEEDLES.items())
def test_each_answer_stands_once_in_a_needle_of_the_key_that_is_asked_for(texts, name, form):
    for sample in part(texts, name):
        turn = turn_of(sample)
        pairs = needle_pairs(turn)
        asked = re.findall(FORMS[form.keys], turn.question.split(" for ", 1)[1])
        assert len(asked) == form.num_queries
        by_key = {key: [v for k, v in pairs if k == key] for key in asked}
        assert sorted(turn.answers) == sorted(v for values in by_key.values() for v in values)
        assert len(turn.answers) == form.num_queries * form.num_values
        assert all(turn.context.count(answer) == 1 for answer in turn.answers)
        assert len({v for _, v in pairs}) == len(pairs)
        for key, value in pairs:
            assert re.fullmatch(FORMS[form.keys], key) and re.fullmatch(FORMS[form.values], value)
        if form.haystack != "needle":
            assert len(pairs) == form.num_keys * form.num_values


@pytest.mark.parametrize(
    ("name", "haystack", "keys", "values", "needles_per_key", "asked"),
    [
        ("niah_single_1", "noise", "words", "numbers", [1], 1),
        ("niah_single_2", "essay", "words", "numbers", [1], 1),
        ("niah_single_3", "essay", "words", "uuids", [1], 1),
        ("niah_multikey_1", "essay", "words", "numbers", [1, 1, 1, 1], 1),
        ("niah_multikey_2", "needle", "words", "numbers", None, 1),
        ("niah_multikey_3", "needle", "uuids", "uuids", None, 1),
        ("niah_multivalue", "essay", "words", "numbers", [4], 4),
        ("niah_multiquery", "essay", "words", "numbers", [1, 1, 1, 1], 4),
    ],
)
def test_the_needle_tasks_differ_as_in_the_paper(texts, name, haystack, keys, values, needles_per_key, asked):
    turn = turn_of(part(texts, name, samples=1)[0])
    pairs = needle_pairs(turn)
    hay = {"noise": "Here we go. There and back again.\n", "essay": "the clerk wrote line"}
    assert [kind for kind, text in hay.items() if text in turn.context] == ([] if haystack == "needle" else [haystack])
    assert all(re.fullmatch(FORMS[keys], key) and re.fullmatch(FORMS[values], value) for key, value in pairs)
    assert list(Counter(key for key, _ in pairs).values()) == (needles_per_key or [1] * len(pairs))
    assert len(turn.answers) == asked


@pytest.mark.parametrize("name", ["niah_multivalue", "niah_multiquery"])
def test_several_answers_are_asked_for_in_the_plural(texts, name):
    turn = turn_of(part(texts, name)[0])
    keys = re.findall(WORDS, turn.question.split(" for ", 1)[1])
    listed = keys[0] if len(keys) == 1 else f"{keys[0]}, {keys[1]}, {keys[2]}, and {keys[3]}"
    assert turn.context.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )
    assert turn.question == f"What are all the special magic numbers for {listed} mentioned in the provided text?"
    assert turn.answer_prefix == f"The special magic numbers for {listed} mentioned in the provided text are"


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_single_3"])
def test_a_single_needle_lies_at_the_depth_of_its_tag(texts, name):
    depths = set()
    for sample in part(texts, name, samples=10):
        context = turn_of(sample).context
        assert sample.tags["depth"] == pytest.approx(context.index("One of the special") / len(context), abs=0.1)
        depths.add(sample.tags["depth"])
    assert len(depths) > 3


@pytest.mark.parametrize("name", ["niah_multikey_1", "niah_multikey_3", "vt", "qa_1"])
def test_only_single_needles_have_a_depth(texts, name):
    assert "depth" not in part(texts, name, samples=1)[0].tags


def test_dev_and_test_share_no_essay(texts):
    seen = {
        split: set(re.findall(r"essay\d\d", turn_of(sample).context))
        for split in ("dev", "test")
        for sample in part(texts, "niah_single_2", split=split, length=4000, samples=1)
    }
    assert seen == {"dev": {"essay04", "essay14"}, "test": {"essay09", "essay19"}}


def test_dev_and_test_share_no_key(texts):
    keys = {
        split: {
            k for s in part(texts, "niah_multikey_2", split=split, length=4000) for k, _ in needle_pairs(turn_of(s))
        }
        for split in ("dev", "test")
    }
    assert min(map(len, keys.values())) > 500
    assert not keys["dev"] & keys["test"]
    halves = {split: {half for key in found for half in key.split("-")} for split, found in keys.items()}
    assert len(halves["dev"] & halves["test"]) < 0.1 * len(halves["dev"])  # only parts of words that have a hyphen


def test_dev_and_test_share_no_paragraph_and_no_listed_word(texts):
    for name, pattern in (("qa_1", r"Town\d+x\d+"), ("qa_2", r"Peak\d+n\d+"), ("cwe", r"\d+\. (\S+)")):
        dev, test = (
            {found for s in part(texts, name, split=split) for found in re.findall(pattern, turn_of(s).context)}
            for split in ("dev", "test")
        )
        assert dev and test and not dev & test


def test_essays_go_round_when_they_are_too_short(texts):
    context = turn_of(part(texts, "niah_single_2", length=4000, samples=1)[0]).context
    assert Counter(re.findall(r"In essay\d\d the clerk wrote line \d+ ", context)).most_common(1)[0][1] > 1


def test_sentences_end_at_their_marks_and_long_ones_are_cut():
    text = 'He said "No." Then (he left.) Was it 3.5 km?\n\nYes! etc. and so on'
    assert needles.split_sentences(text) == [
        'He said "No."',
        "Then (he left.)",
        "Was it 3.5 km?",
        "Yes! etc. and so on",
    ]
    assert [count(piece) for piece in needles.split_sentences("word " * 130)] == [60, 60, 10]


def follow(context: str) -> dict[str, set[str]]:
    """Execute the assignments of a context in order; return the names that have each value."""
    values: dict[str, str] = {}
    for name, other, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", context):
        assert name not in values
        values[name] = values[other] if other else number
    return {number: {name for name in values if values[name] == number} for number in values.values()}


def test_executing_the_assignments_gives_the_variables_that_are_asked_for(texts):
    for sample in part(texts, "vt", samples=5):
        turn = turn_of(sample)
        opening = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        _, example, task = turn.context.split(opening)
        (value,) = re.findall(r"assigned the value (\d{5}) in the text above\.$", turn.question)
        assert follow(task) == {value: set(turn.answers)}
        assert len(turn.answers) == 5 and all(re.fullmatch("[A-Z]{5}", name) for name in turn.answers)
        text, _, rest = example.partition("Question: Find all variables that are assigned the value ")
        (shown,) = follow(text).items()
        reply = re.fullmatch(
            r"(\d+) in the text above\. Answer: According to the chain\(s\) of variable assignment in the text above, "
            r"5 variables are assigned the value \1, they are: ((?: ?[A-Z]{3}){5})\n+",
            rest,
        )
        assert reply and shown == (reply[1], set(reply[2].split())) and shown[0] != value
        assert turn.answer_prefix.endswith(f"5 variables are assigned the value {value}, they are:")
        assert example.count("The grass is green.") == 10


@pytest.mark.parametrize(
    ("length", "often", "seldom", "shown", "shown_often", "shown_seldom"),
    [(4095, 6, 1, 20, 3, 1), (4096, 30, 3, 40, 10, 3)],
)
def test_a_recount_of_the_list_finds_the_common_words(texts, length, often, seldom, shown, shown_often, shown_seldom):
    for sample in part(texts, "cwe", length=length, samples=2):
        turn = turn_of(sample)
        _, example, task = turn.context.split("Memorize the ones that appear most often.\n")
        listed, _, reply = example.partition(
            "\nQuestion: What are the 10 most common words in the above list? Answer: "
        )
        for text, high, low, answers in (
            (task, often, seldom, turn.answers),
            (listed, shown_often, shown_seldom, re.findall(r"\d+\. (\S+)", reply)),
        ):
            numbered = re.findall(r"(\d+)\. (\S+)", text)
            assert [int(n) for n, _ in numbered] == list(range(1, len(numbered) + 1))
            recount = Counter(word for _, word in numbered)
            assert {word for word, times in recount.items() if times == high} == set(answers)
            assert set(recount.values()) == {high, low} and len(answers) == 10
        assert len(Counter(re.findall(r"\d+\. (\S+)", listed))) == shown
        assert not set(re.findall(r"\d+\. (\S+)", task)) & set(re.findall(r"\d+\. (\S+)", listed))


@pytest.mark.parametrize("length", [300, 1200, 4096])
def test_a_recount_of_the_coded_text_finds_the_frequent_words(texts, length):
    """By k^-2 / zeta(2), ranks 2 to 4 take 15.2 %, 6.8 % and 3.8 % of a text, which counts are rounded down from."""
    for sample in part(texts, "fwe", length=length):
        turn = turn_of(sample)
        recount = Counter(turn.context.split("most frequently appeared coded words. ")[1].split())
        dots, *ranked = recount.most_common(5)
        assert dots[0] == "..."
        assert [word for word, _ in ranked[:3]] == list(turn.answers)
        assert ranked[2][1] > (ranked[3][1] if len(ranked) > 3 else 0)
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)
        words = dots[1] / 0.6079271  # 6 / pi^2
        for (_, times), portion in zip(ranked, (0.151982, 0.067547, 0.037995), strict=False):
            assert portion * words - 1 <= times <= portion * (words + 2)


@pytest.mark.parametrize(("name", "source", "gold"), [("qa_1", "squad", 1), ("qa_2", "hotpot", 2)])
def test_the_documents_that_answer_are_among_those_shown(texts, name, source, gold):
    places = []
    for sample in part(texts, name, samples=6, length=400):
        turn = turn_of(sample)
        assert sample.tags == {"source": source} and turn.metric == "string_match_part"
        asked = re.findall(r"Town\w+|Peak\w+", turn.question)
        assert len(asked) == gold
        body = turn.context.split("The following are given documents.\n\n")[1]
        documents = re.findall(r"Document (\d+):\n(.+?)(?=\n\nDocument|\n$)", body, re.DOTALL)
        assert [int(n) for n, _ in documents] == list(range(1, len(documents) + 1))
        assert len({text for _, text in documents}) == len(documents) > 5
        for title in asked:
            (place,) = (i for i, (_, text) in enumerate(documents) if text.startswith((f"{title} was", f"{title}\n")))
            assert any(answer in documents[place][1] for answer in turn.answers)
            places.append(place / len(documents))
        ask = "Answer the question based on the given documents. Only give me the answer and do not output any other "
        assert turn.context.startswith(f"{ask}words.\n\nThe following are given documents.\n\nDocument 1:\n")
        assert turn.question.startswith(f"{ask}words.\n\nQuestion: ") and turn.answer_prefix == "Answer:"
    assert 0.2 < mean(places) < 0.8 and len(set(places)) > 3


def test_documents_of_the_same_article_distract_first(texts):
    turn = turn_of(part(texts, "qa_1", length=300, samples=1)[0])
    (article,) = re.findall(r"Who founded Town(\d+)x", turn.question)
    shown = Counter(re.findall(r"Document \d+:\nTown(\d+)x", turn.context))
    assert shown[article] == 6 or set(shown) == {article}


def test_a_file_of_the_other_format_serves_both_parts_unless_one_is_named(texts):
    found = make("ruler", order(texts, samples=1, qa=texts / "hotpot.json"))
    assert [s.tags for s in found if "/qa_" in s.task] == [{"source": "hotpot"}] * 2
    with pytest.raises(InputError, match="ruler/qa_1 needs questions in SQuAD's format, but .* is in HotpotQA's"):
        make("ruler/qa_1", order(texts, qa=texts / "hotpot.json"))
    with pytest.raises(InputError, match="ruler/qa_2 needs questions in HotpotQA's format, but .* is in SQuAD's"):
        make("ruler/qa_2", order(texts))


def test_too_few_questions_are_refused_with_their_number(texts):
    with pytest.raises(InputError, match="ruler/qa_1 has 72 questions in dev that fit --length 1200"):
        part(texts, "qa_1", samples=73)
    assert len({turn_of(s).question for s in part(texts, "qa_1", samples=72)}) == 72


@pytest.mark.parametrize("limit", [9, 10, 55, 100, 1009, 5000])
def test_the_largest_size_is_found_in_few_measurements(limit):
    """Unit n takes 9 + (n mod 5) tokens, after 10 that are always there."""
    asked = []

    def tokens(n: int) -> int:
        asked.append(n)
        return 10 + sum(9 + i % 5 for i in range(n))

    found = largest(tokens, limit, 0, 10_000)
    assert len(asked) <= 8
    if limit < 10:
        assert found is None
    else:
        assert tokens(found) <= limit < tokens(found + 1)
        assert largest(tokens, limit, 0, 3) == min(found, 3)


@pytest.fixture(scope="module")
def originals() -> list[dict]:
    """Read samples that RULER's own generator made."""
    data = Path(os.environ.get("VESTIGE_DATA") or Path(__file__).resolve().parents[5] / "shared" / "data")
    path = data / "ruler" / "niah_multikey_3.4096.head25.jsonl"
    if not path.is_file():
        pytest.skip("needs samples of the original generator")
    return [json.loads(line) for line in path.read_text().splitlines()]


def skeleton(text: str) -> str:
    """Return a text with every UUID blotted out and repeated lines made one."""
    lines = re.sub(UUID, "<uuid>", text).split("\n")
    return "\n".join(line for i, line in enumerate(lines) if i == 0 or line != lines[i - 1])


def test_multikey_3_has_the_form_of_the_original_samples(texts, originals):
    ours = [
        f"{turn.context}\n{turn.question} {turn.answer_prefix}"
        for turn in map(turn_of, part(texts, "niah_multikey_3", length=4096, samples=5))
    ]
    assert {skeleton(text) for text in ours} == {skeleton(original["input"]) for original in originals}


def test_multikey_3_has_as_many_distinct_uuids_as_the_original_at_the_same_size(texts, originals):
    """Each needle brings a key and a value of its own; the question only repeats."""

    def numbers(text: str) -> tuple[int, int]:
        return len(re.findall("One of the special", text)), len(set(re.findall(UUID, text)))

    shown = {numbers(original["input"]) for original in originals}
    lines = {lines for lines, _ in shown}
    assert shown == {(51, 102)}
    size = lines.pop() - 1
    draft = next(PARTS["niah_multikey_3"](order(texts, length=4096), "niah_multikey_3"))
    turn = draft.build(size)
    assert numbers(turn.context) == (51, 102)
    (original,) = (o for o in originals if o["index"] == 0)
    (asked,) = re.findall(f"({UUID}) mentioned in the provided text\\?", original["input"])
    assert f"for {asked} is: {original['outputs'][0]}." in original["input"]  # as our own test of needles demands
