"""Where a passage stands among tokens, by the offsets of one tokenisation."""

import pytest

from vestige import InputError, Span
from vestige.text.locate import find, find_numbered

TEXT = "Hi. The code is 731.\nThe end. The"
OFFSETS = [
    (-9, -4),
    (-4, 0),
    (0, 2),
    (2, 3),
    (3, 7),
    (7, 12),
    (12, 15),
    (15, 18),
    (18, 19),
    (19, 20),
    (20, 24),
    (24, 29),
    (29, 33),
]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("The code is 731.", Span(4, 10)),
        ("  The code\n", Span(4, 6)),
        ("od", Span(5, 6)),
        ("731", Span(7, 9)),
        ("31.\nThe", Span(7, 11)),
        ("Hi", Span(2, 3)),
    ],
)
def test_a_passage_is_the_tokens_that_share_a_character_with_it(part, expected):
    assert find(TEXT, part, OFFSETS) == expected


def test_white_space_that_tokens_share_does_not_count():
    assert find("a b", "b", [(0, 2), (2, 3)]) == Span(1, 2)


def test_a_passage_that_occurs_often_is_refused_with_its_places():
    with pytest.raises(InputError) as refusal:
        find(TEXT, "The", OFFSETS)
    assert "occurs 3 times: line 1 (2:3), line 2 (8:9), line 2 (10:11)" in str(refusal.value)


@pytest.mark.parametrize(("part", "said"), [("nothing", "does not occur"), (" \n", "is empty"), ("x" * 60, "xxx...")])
def test_a_passage_that_is_not_there_is_named(part, said):
    with pytest.raises(InputError, match=said):
        find(TEXT, part, OFFSETS)


def test_a_passage_that_shares_a_token_with_the_chat_text_is_refused():
    with pytest.raises(InputError, match="shares a token with the chat text"):
        find("Hi you", "Hi", [(-3, 1), (1, 2), (2, 6)])


def test_tokens_are_counted_from_the_first_of_the_text():
    assert find_numbered(0, 2, OFFSETS) == Span(2, 4)
    assert find_numbered(9, 11, OFFSETS) == Span(11, 13)


@pytest.mark.parametrize("numbers", [(3, 3), (5, 2), (0, 12)])
def test_numbers_beyond_the_text_are_refused(numbers):
    with pytest.raises(InputError, match="tokens 0 to 11"):
        find_numbered(*numbers, OFFSETS)
