"""The tasks of the benchmark of erasers, in one dict from a name to the maker of its samples."""

from collections.abc import Iterator
from functools import partial
from itertools import islice

from vestige.bench.erasing import distractors, needles, stories
from vestige.bench.erasing.sample import EraseSample
from vestige.bench.erasing.story_templates import Maker, make_each
from vestige.bench.tasks import TaskSpec
from vestige.errors import InputError, unknown_name_message

TASKS: dict[str, Maker] = {
    "needles_early": make_each(partial(needles.make_conflict, right=1)),
    "needles_late": make_each(partial(needles.make_conflict, right=0)),
    "distractor_qa": distractors.make_samples,
    "tool_result": make_each(stories.make_tool_result),
    "injection": make_each(stories.make_injection),
    "preference": make_each(stories.make_preference),
    "derived_0": stories.derived_fact_samples(0),
    "derived_250": stories.derived_fact_samples(250),
    "derived_1500": stories.derived_fact_samples(1500),
    "several_spans": make_each(partial(needles.make_conflict, values=4)),
    "harmless": make_each(needles.make_harmless),
    "repeat": make_each(needles.make_repeat),
}
QA_TASKS = frozenset({"distractor_qa"})
"""Tasks that need a file of questions."""


def check(name: str) -> None:
    """Raise an InputError that lists the tasks if none has this name."""
    if name not in TASKS:
        raise InputError(unknown_name_message("task", name, TASKS))


def make(name: str, spec: TaskSpec) -> Iterator[EraseSample]:
    """Yield the samples of a named task; sample ``i`` does not depend on their number, and dev and test share nothing.

    Raises:
        InputError: No such task, no length or one that is too short, or the texts it needs are missing or malformed.
    """
    check(name)
    yield from islice(TASKS[name](spec, name), spec.num_samples)
