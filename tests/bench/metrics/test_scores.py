"""Every metric against values worked out by hand, LongBench's also where its published definition is odd."""

# ruff: noqa: RUF001 (Chinese punctuation)

import sys

import pytest

from vestige import InputError
from vestige.bench.metrics.scores import METRICS
from vestige.bench.sample import Turn


def score(metric: str, reply: str, *answers: str, choices: tuple[str, ...] = (), prefix: str = "") -> float:
    turn = Turn(context="", question="", answers=answers, metric=metric, choices=choices, answer_prefix=prefix)
    return METRICS[metric](reply, turn)


def test_every_metric_is_one_for_the_answer_itself_and_zero_for_an_empty_reply():
    answers = {"retrieval": "Paragraph 7", "retrieval_zh": "段落7", "count": "7", "choice": "B"}
    for metric in METRICS:
        answer = answers.get(metric, "Rain, tomorrow")
        reply = "The correct answer is (B)" if metric == "choice" else answer
        assert score(metric, reply, answer, choices=(answer,)) == pytest.approx(1.0, abs=1e-7), metric
        assert score(metric, "", answer, choices=(answer,)) == 0.0, metric


def test_contains_wants_every_answer_and_ignores_case():
    assert score("contains", "it is PARIS, or Rome", "Paris", "rome") == 1.0
    assert score("contains", "it is Paris", "Paris", "Rome") == 0.0


def test_exact_compares_as_squad_does_and_takes_any_answer():
    assert score("exact", " The  Eiffel-Tower!", "eiffeltower") == 1.0  # "-" goes without leaving a space
    assert score("exact", "a tower", "Big Ben", "the tower.") == 1.0
    assert score("exact", "Eiffel Tower", "tower") == 0.0
    assert score("exact", "theory", "ory") == 0.0  # articles are words, not letters


def test_f1_counts_shared_tokens_with_repeats():
    # reply: cat sat on mat (4), answer: cat on cat (3); shared: cat once, on once = 2; 2 * 2 / (4 + 3)
    assert score("f1", "The cat sat on a mat.", "cat on the cat") == pytest.approx(4 / 7)
    # the best answer counts: "dog" 0, "cat sat": P 2/4, R 1, F 2/3
    assert score("f1", "The cat sat on a mat.", "dog", "cat sat") == pytest.approx(2 / 3)
    assert score("f1", "the a an", "the") == 0.0  # nothing is left of either


def test_f1_zh_counts_the_words_that_jieba_finds_without_punctuation():
    # 我们 / 喜欢 / 北京 against 我们 / 在 / 北京: two words shared, 2 * 2 / (3 + 3)
    assert score("f1_zh", "我们喜欢北京。", "我们，在北京！") == pytest.approx(2 / 3)


def test_rouge_l_is_that_of_the_package_rouge():
    # One sentence each, the words in order; a longest common subsequence of "a b c d e" and "a c x e" is a c e.
    # P = 3/4, R = 3/5, F = 2 * .75 * .6 / 1.35 = 2/3
    assert score("rouge_l", "a c x e", "a b c d e") == pytest.approx(2 / 3, abs=1e-7)
    # Order matters: of "c a" only one word is common with "a c". P = R = 1/2
    assert score("rouge_l", "c a", "a c") == pytest.approx(0.5, abs=1e-7)


def test_rouge_l_keeps_case_and_punctuation_and_counts_a_word_once():
    # {The, cat,} against {the, cat}: nothing common
    assert score("rouge_l", "The cat,", "the cat") == 0.0
    # common subsequence of "a a a b" and "a a c" is a a, as words {a}; P = 1/2 of {a, b}, R = 1/2 of {a, c}
    assert score("rouge_l", "a a a b", "a a c") == pytest.approx(0.5, abs=1e-7)


def test_rouge_l_unites_what_pairs_of_sentences_share():
    # answer "a b c d e"; replies "a b x" and "a c y e": common a b, then a c e; union a b c e
    # P = 4 / |{a b x c y e}| = 4/6, R = 4/5, F = 2 * 4 / (6 + 5)
    assert score("rouge_l", "a b x. a c y e.", "a b c d e") == pytest.approx(8 / 11, abs=1e-7)
    # white space between full stops is a sentence with the empty word: "a . " is {a, ""}; P = 1/2, R = 1
    assert score("rouge_l", "a . ", "a") == pytest.approx(2 / 3, abs=1e-7)
    assert score("rouge_l", "...", "a") == 0.0


def test_rouge_l_takes_the_same_one_of_several_longest_subsequences():
    # "a b" and "b a" share a or b. Walking back from the ends of answer x and reply y, rouge drops the reply's last
    # word unless the table above is larger: from (b, a) it drops a of the reply, and finds b = b.
    # With the second sentence "b", the union is {b} alone: P = 1/2 of {a b}, R = 1/2
    assert score("rouge_l", "b a.b", "a b") == pytest.approx(0.5, abs=1e-7)
    # the other way round it would be {a} and the union {a, b}: with the sentence "a" it is
    assert score("rouge_l", "b a.a", "a b") == pytest.approx(1.0, abs=1e-7)


def test_rouge_l_of_long_sentences_is_not_zero():
    reply, answer = (" ".join(["hit", *(f"{letter}{n}" for n in range(599))]) for letter in "ab")
    # one common word of 600 on both sides; rouge walks back 1,198 calls deep, fails, and LongBench makes that a 0
    assert score("rouge_l", reply, answer) == pytest.approx(1 / 600, abs=1e-7)


def test_rouge_l_zh_is_rouge_l_over_the_words_of_jieba():
    # 我们 喜欢 北京 。 against 我们 在 北京 。: common 我们 北京 。 (punctuation is a word here): P = R = 3/4
    assert score("rouge_l_zh", "我们喜欢北京。", "我们在北京。") == pytest.approx(0.75, abs=1e-7)


def test_rouge_score_is_the_one_of_google():
    # lower case, no punctuation, repeats count: "the cat the" and "the cat": common 2, P 2/3, R 1, F 4/5
    assert score("rouge_score", "The cat, the!", "the cat") == pytest.approx(0.8)
    # rouge has the words {The, cat,, the!} and {the, cat}: nothing
    assert score("rouge_l", "The cat, the!", "the cat") == 0.0


def test_ruler_counts_answers_that_occur():
    assert score("string_match_all", "7 and NINE", "7", "nine", "11") == pytest.approx(2 / 3)
    assert score("string_match_part", "7 and NINE", "11", "nine") == 1.0
    assert score("string_match_part", "7 and NINE", "11", "ten") == 0.0


def test_classification_shares_the_point_among_the_classes_named():
    choices = ("Date", "City", "Other")
    assert score("classification", "City", "City", choices=choices) == 1.0
    assert score("classification", "City or Date", "City", choices=choices) == 0.5
    assert score("classification", "Date", "City", choices=choices) == 0.0
    assert score("classification", "city", "City", choices=choices) == 0.0  # case counts


def test_classification_leaves_out_classes_whose_names_are_in_the_right_one():
    choices = ("location", "Other location", "Other")
    # All three are named. "location" goes, and with it, as published, "Other location" is passed over unseen;
    # "Other" is looked at and goes: one is left.
    assert score("classification", "Other location", "Other location", choices=choices) == 1.0
    # "Other" goes, "location" moves to its place and is passed over: two are left.
    choices = ("Other", "location", "Other location")
    assert score("classification", "Other location", "Other location", choices=choices) == 0.5


@pytest.mark.parametrize(
    ("metric", "reply", "answer", "expected"),
    [
        ("count", "There are 5, not 6 or 5", "5", 2 / 3),
        ("count", "15", "5", 0.0),
        ("count", "five", "5", 0.0),
        ("retrieval", "Paragraph 7", "Paragraph 7", 1.0),
        ("retrieval", "7 or 17", "Paragraph 7", 0.5),
        ("retrieval_zh", "段落7，不是段落8", "段落7", 0.5),
    ],
)
def test_numbers_are_shared_among_those_of_the_reply(metric, reply, answer, expected):
    assert score(metric, reply, answer) == pytest.approx(expected)


def test_a_retrieval_answer_without_a_paragraph_is_an_error():
    with pytest.raises(InputError, match=r"such as 'Paragraph 7'; got '7'"):
        score("retrieval", "7", "7")


def test_code_similarity_compares_the_first_line_that_is_code():
    # "ab" against "abcd": two common characters, 2 * 2 / 6 = .667, in hundredths .67
    assert score("code_similarity", "\n\n```python\n# first\n// second\nab\nabcd", "abcd") == 0.67
    assert score("code_similarity", "# only a comment", "abcd") == 0.0
    # Levenshtein's ratio counts common characters in order: "ab" and "ba" share one, 2 * 1 / 4
    assert score("code_similarity", "ab", "ba") == 0.5


def test_first_lines_are_scored_alone():
    assert score("f1_first_line", "\n\nParis\nRome and more", "Paris") == 1.0
    assert score("f1", "\n\nParis\nRome and more", "Paris") == pytest.approx(2 / 5)
    assert score("rouge_l_first_line", "a b\nc d", "a b") == pytest.approx(1.0, abs=1e-7)
    assert score("classification_first_line", "City\nDate", "City", choices=("City", "Date")) == 1.0
    assert score("classification", "City\nDate", "City", choices=("City", "Date")) == 0.5


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("The correct answer is (C)", 1.0),
        ("So: **The correct answer is (C)**, as said.", 1.0),
        ("The correct answer is C.", 1.0),
        ("The correct answer is A. No: The correct answer is (C)", 1.0),  # parentheses are looked for first
        ("The correct answer is (A). The correct answer is (C)", 0.0),
        ("(C)", 0.0),
        ("the correct answer is (C)", 0.0),
    ],
)
def test_choice_reads_the_letter_as_longbench_v2_does(reply, expected):
    assert score("choice", reply, "C") == expected


def test_choice_reads_what_opens_the_reply_with_it():
    assert score("choice", "C) since", "C", prefix="The correct answer is (") == 1.0
    assert score("choice", "C", "C", prefix="The correct answer is") == 0.0  # no space
    assert score("choice", " D) or (C)", "C", prefix="The correct answer is (") == 0.0


@pytest.mark.parametrize(
    ("metric", "module", "package"),
    [
        ("f1_zh", "jieba", "jieba"),
        ("rouge_l_zh", "jieba", "jieba"),
        ("rouge_score", "rouge_score.rouge_scorer", "rouge-score"),
        ("code_similarity", "rapidfuzz.fuzz", "rapidfuzz"),
    ],
)
def test_an_absent_package_prints_the_pip_line(monkeypatch, metric, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf'needs {package}, .*pip install "vestige\[bench\]"'):
        score(metric, "a", "b")


def test_metrics_need_no_package_until_they_are_used():
    from subprocess import run

    code = (
        "import sys, vestige.bench.metrics.scores; assert not {'jieba', 'rapidfuzz', 'rouge_score'} & set(sys.modules)"
    )
    run([sys.executable, "-c", code], check=True)
