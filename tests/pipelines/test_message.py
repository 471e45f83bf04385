"""A message of a conversation after a span was erased: its span, its offsets, its erased characters."""

import json
from dataclasses import asdict

from vestige.pipelines.message import Message
from vestige.spans import PositionMap, Span

SAID = Message(role="user", text="abcdef", span=Span(4, 7), offsets=((0, 2), (2, 4), (4, 6)))


def test_positions_stay_or_move_up_and_erased_characters_are_kept():
    inside = Span(5, 6)
    stays, moves = SAID.without(inside, None), SAID.without(inside, PositionMap((inside,)))
    assert stays.span == SAID.span and stays.offsets == SAID.offsets and stays.erased == ((2, 4),)
    assert moves.span == Span(4, 6) and moves.offsets == ((0, 2), (4, 6)) and moves.erased == ((2, 4),)


def test_a_message_moves_up_when_an_earlier_one_leaves_and_ends_when_all_of_it_does():
    assert SAID.without(Span(0, 2), PositionMap((Span(0, 2),))).span == Span(2, 5)
    gone = SAID.without(Span(3, 9), PositionMap((Span(3, 9),)))
    assert gone.span is None and gone.offsets == () and gone.without(Span(0, 1), None) == gone


def test_a_saved_message_comes_back():
    for message in (SAID, SAID.without(Span(4, 7), PositionMap((Span(4, 7),)))):
        assert Message.parse(json.loads(json.dumps(asdict(message)))) == message
