"""The training ground: one loop, one way to bring data, for every trainer.

A trainer is a :class:`Task`: parameters and a loss for each sample. :func:`train` does the rest::

    train_on, validate_on = split(read(["texts/", "more.jsonl"]))
    train(MyTask(train_on, validate_on), LoopConfig(steps=1000), Path("out"), resume=True)

Names are loaded when they are first used: documents bring in transformers, which the loop does without.
"""

from typing import TYPE_CHECKING, Any

from vestige.utils import registry

if TYPE_CHECKING:
    from vestige.learn.config import LoopConfig as LoopConfig
    from vestige.learn.documents import Document as Document
    from vestige.learn.documents import lines_of as lines_of
    from vestige.learn.documents import read as read
    from vestige.learn.documents import split as split
    from vestige.learn.documents import windows as windows
    from vestige.learn.loop import Outcome as Outcome
    from vestige.learn.loop import train as train
    from vestige.learn.order import generator_of as generator_of
    from vestige.learn.order import seed_of as seed_of
    from vestige.learn.parallel import Processes as Processes
    from vestige.learn.parallel import processes as processes
    from vestige.learn.task import Task as Task

_HOME = {
    "Document": "vestige.learn.documents:Document",
    "LoopConfig": "vestige.learn.config:LoopConfig",
    "Outcome": "vestige.learn.loop:Outcome",
    "Processes": "vestige.learn.parallel:Processes",
    "Task": "vestige.learn.task:Task",
    "generator_of": "vestige.learn.order:generator_of",
    "lines_of": "vestige.learn.documents:lines_of",
    "processes": "vestige.learn.parallel:processes",
    "read": "vestige.learn.documents:read",
    "seed_of": "vestige.learn.order:seed_of",
    "split": "vestige.learn.documents:split",
    "train": "vestige.learn.loop:train",
    "windows": "vestige.learn.documents:windows",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    return registry.member(name, _HOME, __name__)
