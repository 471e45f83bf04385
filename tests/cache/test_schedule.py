"""The settle rule of the design: when room is made under plain generate, after a prefill, and with speculation."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vestige.cache.schedule import Schedule

EVERY = 4


def settles(schedule: Schedule, *feeds: int) -> list[int]:
    """Return the numbers of the forwards that a settle came before, for forwards of so many tokens each."""
    before = []
    for number, new in enumerate(feeds):
        if schedule.is_due(new, EVERY):
            before.append(number)
            schedule.reset()
        schedule.count(new)
    return before


def test_a_prompt_is_settled_once_before_its_first_generated_token():
    assert settles(Schedule(), 100, *[1] * 4) == [1]


def test_a_prompt_of_one_token_counts_as_generated():
    assert settles(Schedule(), *[1] * 9) == [4, 8]


def test_settles_come_when_so_many_tokens_were_generated_since_the_last():
    assert settles(Schedule(), 100, *[1] * 10) == [1, 5, 9]


def test_a_second_turn_is_settled_like_the_first():
    assert settles(Schedule(), 100, 1, 1, 30, 1, 1) == [1, 4]


def test_a_settle_that_is_due_comes_before_the_next_turn():
    assert settles(Schedule(), 100, 1, 1, 1, 1, 30, 1) == [1, 5, 6]


def test_a_long_prompt_in_pieces_is_settled_before_a_piece_once_a_chunk_was_fed():
    assert settles(Schedule(chunk=10), 6, 6, 6, 6, 1) == [2, 4]
    assert settles(Schedule(chunk=10), 10, 10, 10, 1) == [1, 2, 3]


def test_nothing_is_settled_inside_a_prefill_which_settles_itself():
    assert settles(Schedule(chunk=10, reading=True), 10, 10, 1, 1, 1, 1, 1, 1) == []


def test_a_question_of_at_most_a_chunk_stays_whole_until_enough_tokens_were_generated():
    assert settles(Schedule(chunk=10, prefilled=True), 10, 1, 1, 1, 1, 1) == [5]


def test_a_question_in_two_pieces_stays_whole_too():
    assert settles(Schedule(chunk=10, prefilled=True), 5, 5, 1, 1, 1, 1, 1) == [6]


def test_a_question_longer_than_a_chunk_is_settled_before_the_first_generated_token():
    assert settles(Schedule(chunk=10, prefilled=True), 11, 1, 1) == [1]


def test_a_second_question_is_settled_with_what_was_generated_before_it():
    assert settles(Schedule(chunk=10, prefilled=True), 5, 1, 1, 1, 1, 5, 1, 1, 1, 1, 1) == [5, 10]


def test_generation_right_after_a_prefill_is_settled_in_its_rhythm():
    assert settles(Schedule(chunk=10, prefilled=True), *[1] * 9) == [4, 8]


def test_candidates_count_as_generated_once_some_were_taken_back():
    schedule = Schedule(chunk=10, prefilled=True)
    schedule.count(3)
    schedule.take_back(2)
    assert not schedule.is_due(3, EVERY), "one token was accepted"
    schedule.count(3)
    assert schedule.is_due(3, EVERY), "four tokens were generated"
    assert schedule.is_due(1, EVERY)


def test_tokens_taken_back_do_not_count():
    schedule = Schedule(speculative=True)
    schedule.count(5)
    schedule.count(1)
    schedule.take_back(6)
    assert (schedule.prompt, schedule.generated) == (0, 0)
    assert not schedule.is_due(1, EVERY)


def test_taking_back_more_than_was_fed_since_the_last_settle_leaves_nothing_to_count():
    schedule = Schedule()
    schedule.count(2)
    schedule.take_back(50)
    assert (schedule.prompt, schedule.generated) == (0, 0)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.one_of(st.just(1), st.integers(2, 30)), max_size=40),
    st.builds(Schedule, chunk=st.just(10), prefilled=st.booleans(), speculative=st.booleans()),
)
def test_tokens_since_the_last_settle_stay_bounded_before_any_forward(feeds, schedule):
    since = 0
    for new in feeds:
        if schedule.is_due(new, EVERY):
            schedule.reset()
            since = 0
        assert since < schedule.chunk + EVERY
        schedule.count(new)
        since += new


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 30))
def test_asking_whether_a_settle_is_due_changes_nothing(feeds, new):
    schedule = Schedule(chunk=10)
    for fed in feeds:
        schedule.count(fed)
    before = Schedule(**vars(schedule))
    schedule.is_due(new, EVERY)
    assert schedule == before


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 9), st.booleans())
def test_nothing_is_due_right_after_a_settle(new, prefilled):
    schedule = Schedule(chunk=10, prefilled=prefilled)
    schedule.count(500)
    schedule.reset()
    assert not schedule.is_due(new, EVERY)
