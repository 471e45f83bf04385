"""Tales for the gates' trainer share no template and no word of account with what they are judged by."""

import random
import re
from pathlib import Path

import pytest

from vestige.bench import tasks
from vestige.bench.erasing import stories
from vestige.bench.tasks import SPLITS, TaskSpec, sources
from vestige.training.data import vocabulary
from vestige.training.data.synthetic_qa import story as tales

PROSE = [f"Sentence number {i} says that the calm year {1000 + 7 * i} was good for Alice." for i in range(16)]
STATED = (*vocabulary.STATED, *tales.TOLD, *tales.ASSIGNED, *tales.HEARD)
ASKED = (*vocabulary.ASK, *vocabulary.REPLY, *tales.ASK_ASSIGNED, *tales.QUOTE)


def pattern(form: str) -> str:
    """Return a pattern for all that a form can say; names in code are one word, values at most two."""
    named = re.escape(form).replace(r"\{n\}", r"\S+").replace(r"\{v\}", r"\S+( \S+)?")
    return re.sub(r"\\{\w+\\}", ".+", named)


@pytest.fixture(scope="module")
def essays(tmp_path_factory) -> Path:
    """Write essays that say nothing."""
    folder = tmp_path_factory.mktemp("essays")
    for i in range(20):
        said = " ".join(f"Day {n} of year {i} went by like all others." for n in range(90))
        (folder / f"{i:02}.txt").write_text(said)
    return folder


@pytest.mark.parametrize(
    "name", ["ruler/niah_single_1", "ruler/niah_single_3", "ruler/niah_multikey_1", "ruler/vt", "dialogue"]
)
def test_no_statement_question_or_reply_is_phrased_like_a_benchmarks(essays, name):
    pytest.importorskip("wonderwords")
    order = TaskSpec(
        count=lambda text: len(text.split()),
        measure=lambda turns: sum(len(turn.context.split()) for turn in turns),
        length=900,
        samples=3,
        essays=essays,
    )
    stated, asked = (re.compile("|".join(map(pattern, forms))) for forms in (STATED, ASKED))
    for sample in tasks.make(name, order):
        for turn in sample.turns:
            said = re.split(r"(?<=[.!?])\s|\n", turn.context)
            assert not [one for one in said if stated.fullmatch(one.strip())]
            assert not asked.fullmatch(turn.question) and not asked.fullmatch(turn.answer_prefix)


def test_what_is_asked_of_a_setting_stands_in_the_text_word_for_word():
    quoted = 0
    for seed in range(60):
        text, asked = tales.make_assignments(random.Random(seed), ["One.", "Two.", "Three.", "Four."])
        assert all(f"{one.prefix} {one.answer}" in text for one in asked)
        quoted += '"' in asked[0].answer
    assert 0 < quoted < 60


def test_nothing_is_about_what_benchmarks_ask_for():
    words = " ".join([*STATED, *ASKED, *(relation.what for relation in vocabulary.RELATIONS)]).lower().split()
    asked = {*(kind for kind, _ in stories.HABITS), "favourite", "stock", "door", "locker", "badge"}
    assert not {*words} & {*asked, "special", "magic", "hidden", "quiz", "mentioned", "provided", "variables", "var"}


def test_no_name_or_value_is_a_word_that_benchmarks_draw():
    pytest.importorskip("wonderwords")
    drawn = {word for split in SPLITS for word in sources.words(split).all()}
    lists = [value for value in vars(vocabulary).values() if isinstance(value, tuple)]
    ours = {word for listed in lists for word in listed if isinstance(word, str) and word.isalpha()}
    assert len(ours) > 80 and not drawn & {word.lower() for word in ours}


def test_no_name_or_value_has_the_shape_of_a_benchmarks():
    shapes = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-|\d{7}$|[a-z]+-[a-z]+$")
    for seed in range(300):
        rng = random.Random(seed)
        values = [relation.value(rng) for relation in vocabulary.RELATIONS]
        assert not [one for one in (*values, vocabulary.draw_subject(rng)) if shapes.match(one)]
