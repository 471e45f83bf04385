"""Samples as ids: what is counted, refused, and put in one batch."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vestige import InputError
from vestige.bench import tasks
from vestige.bench.config import BenchConfig
from vestige.bench.items import Item, collect, make_batches
from vestige.bench.methods.conversation import Job, TurnIds
from vestige.bench.methods.method import Method
from vestige.bench.sample import Sample, Turn
from vestige.bench.tokenization import Renderer


def turn(context: str = "The lamp is lit.", **changes: Any) -> Turn:
    return Turn(**({"context": context, "question": "Who?", "answers": ("Ada",), "max_new_tokens": 4} | changes))


def sample(index: int, *turns: Turn, task: str = "lamps", length: int = 100) -> Sample:
    return Sample(task=task, index=index, length=length, turns=turns or (turn(),))


@pytest.fixture
def orders(monkeypatch) -> list[tasks.TaskSpec]:
    """Return the orders that the tasks "first" and "second" were given."""
    given: list[tasks.TaskSpec] = []

    def samples(order: tasks.TaskSpec) -> list[Sample]:
        given.append(order)
        return [sample(i, task=order.part or "lamps", length=order.length or 100) for i in range(order.samples or 2)]

    module = ModuleType("made_up_task")
    module.samples = samples
    monkeypatch.setitem(sys.modules, "made_up_task", module)
    for name in ("first", "second", "longbench", "cases"):
        monkeypatch.setitem(tasks.TASKS, name, "made_up_task:samples")
    return given


@pytest.fixture
def collected(chatter):
    """Collect the items of a configuration."""

    def call(*names: str, **options: Any) -> list[Item]:
        config = BenchConfig(tasks=names, methods=(Method(policy="full"),), **options)
        return list(collect(config, Renderer(chatter[1], chatter[0], question_aware=config.question_aware)))

    return call


def cells(items: list[Item]) -> list[tuple[str, int, int, int]]:
    return [(item.sample.task, item.sample.length, item.sample.index, item.rank) for item in items]


def test_every_task_and_length_in_order_with_ranks_of_their_own(orders, collected):
    assert cells(collected("first/a", "second/b", lengths=(100, 200))) == [
        (task, length, i, i) for task in ("a", "b") for length in (100, 200) for i in range(2)
    ]


def test_a_sample_that_two_names_bring_comes_once(orders, collected):
    assert cells(collected("first/a", "second/a", "first/b", samples=3)) == [
        (t, 100, i, i) for t in "ab" for i in range(3)
    ]


def test_an_order_has_what_the_user_wants(orders, collected, tmp_path):
    for name in "qp":
        (tmp_path / name).touch()
    told = {"samples": 5, "seed": 3, "split": "test", "answer_room": 9, "essays": tmp_path, "qa": tmp_path / "q"}
    collected("first/x", lengths=(64,), prompts=tmp_path / "p", **told)
    (order,) = orders
    assert {name: getattr(order, name) for name in told} == told
    assert (order.length, order.part, order.prompts, order.file) == (64, "x", tmp_path / "p", None)


def test_a_file_goes_to_the_task_that_it_is_for(orders, collected, tmp_path):
    files = {"cases": tmp_path / "cases", "longbench": tmp_path / "bench"}
    for file in files.values():
        file.touch()
    collected("cases", "longbench", "cases/lamps", **files)
    assert [order.file for order in orders] == [tmp_path / "cases", tmp_path / "bench", tmp_path / "cases"]


def test_long_texts_are_cut_to_the_positions_of_the_model(orders, collected):
    collected("longbench", "first")
    assert [order.length for order in orders] == [512, None]


def test_texts_are_counted_by_the_models_own_tokenizer(orders, collected, chatter):
    collected("first", question_aware=True)
    (order,) = orders
    assert order.count("The keeper") == len(chatter[1]("The keeper", add_special_tokens=False)["input_ids"])
    job = Renderer(*reversed(chatter)).job([turn()])
    assert order.measure([turn()]) == len(job.turns[0].context) + len(job.turns[0].question) + 4


def test_a_sample_beyond_the_positions_is_refused_with_both_numbers(monkeypatch, orders, collected, chatter):
    renderer = Renderer(*reversed(chatter))
    room = 512 - renderer.measure([turn(max_new_tokens=0)])

    def samples(order: tasks.TaskSpec) -> list[Sample]:
        return [sample(7, turn(max_new_tokens=room + over))]

    monkeypatch.setattr(sys.modules["made_up_task"], "samples", samples)
    over = 0
    assert len(collected("first")) == 1
    over = 1
    with pytest.raises(
        InputError, match="sample 7 of lamps takes 513 tokens, reply included; the model has 512 positions"
    ):
        collected("first")


def item(*widths: int, task: str = "a", length: int = 100, index: int = 0) -> Item:
    turns = tuple(TurnIds(context=(1,) * n, question=(2,), max_new_tokens=3) for n in widths)
    return Item(sample(index, task=task, length=length), Job(turns=turns, stop=()), index)


def grouped(items: list[Item], most: int) -> list[list[int]]:
    return [[len(one.job.turns[0].context) for one in group] for group in make_batches(items, most)]


def test_batches_are_of_neighbours_at_most_so_many():
    items = [item(50, index=i) for i in range(7)]
    groups = list(make_batches(items, 3))
    assert [len(group) for group in groups] == [3, 3, 1]
    assert [one for group in groups for one in group] == items
    assert [len(group) for group in make_batches(items, 1)] == [1] * 7
    assert list(make_batches([], 3)) == []


def test_pads_stay_within_a_twentieth_of_the_text():
    # 5 pads beside 195 tokens, and 9 beside 191, are within it; 15 beside 285, and 10 beside 190, are not
    assert grouped([item(100), item(95), item(90), item(99)], 4) == [[100, 95], [90, 99]]
    assert grouped([item(100), item(90)], 4) == [[100], [90]]


def test_even_batches_have_no_pads():  # pads would shift the borders of chunks
    groups = make_batches([item(100), item(100), item(99), item(100)], 4, even=True)
    assert [[len(one.job.turns[0].context) for one in group] for group in groups] == [[100, 100], [99], [100]]


def test_other_cells_and_dialogues_do_not_share_a_batch():
    assert (
        grouped([item(50), item(50, task="b"), item(50, task="b", length=200), item(50, length=200)], 4) == [[50]] * 4
    )
    assert grouped([item(50), item(50, 9), item(50, 9), item(50), item(50)], 4) == [[50], [50], [50], [50, 50]]


def test_a_digest_is_of_everything_that_makes_a_record():
    one = item(50)
    assert one.digest == item(50).digest == item(50, index=3).digest
    others = [item(51), item(50, 9), Item(one.sample, Job(turns=one.job.turns, stop=(2,)), 0)]
    assert len({one.digest, *(other.digest for other in others)}) == 4


@pytest.mark.parametrize("change", [{"answers": ("Bo",)}, {"metric": "exact"}, {"choices": ("Ada", "Bo")}])
def test_other_answers_under_the_same_text_are_another_digest(change):
    job = item(50).job
    same, other = (Item(sample(0, turn(**one)), job, 0).digest for one in ({}, change))
    assert same != other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "name at least one task: cases, dialogue"),
        ({"tasks": ("rulr",)}, "unknown task 'rulr'; did you mean 'ruler'. available: cases, dialogue"),
        ({"split": "train"}, "--split must be one of dev, test, got 'train'"),
        ({"lengths": (100, 0)}, "--length must be positive"),
        ({"samples": 0}, "--samples must be at least 1, got 0"),
        ({"chunk": 0}, "--chunk must be at least 1, got 0"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"essays": Path("gone")}, "no such file or folder: gone"),
        ({"cases": Path("n" * 300)}, "no such file or folder: nnn"),
        ({"answer_room": 0}, "--answer-room must be at least 1, got 0"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        BenchConfig(**({"tasks": ("niah",), "methods": ()} | changes))
