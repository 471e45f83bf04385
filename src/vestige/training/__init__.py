"""The training ground: one loop, one way to bring data, for every trainer.

A trainer is a :class:`Task`: parameters and a loss for each sample. :func:`train` does the rest::

    train_on, validate_on = split(read(["texts/", "more.jsonl"]))
    train(MyTask(train_on, validate_on), LoopConfig(steps=1000), Path("out"), resume=True)

Names are loaded when they are first used: documents bring in transformers, which the loop does without.
"""

from typing import TYPE_CHECKING, Any

from vestige.utils import registry

if TYPE_CHECKING:
    from vestige.training.config import LoopConfig as LoopConfig
    from vestige.training.data.documents import Document as Document
    from vestige.training.data.documents import lines_of as lines_of
    from vestige.training.data.documents import read as read
    from vestige.training.data.documents import split as split
    from vestige.training.data.documents import windows as windows
    from vestige.training.distributed import Processes as Processes
    from vestige.training.distributed import processes as processes
    from vestige.training.loop import Outcome as Outcome
    from vestige.training.loop import train as train
    from vestige.training.sampler import generator_of as generator_of
    from vestige.training.sampler import seed_of as seed_of
    from vestige.training.task import Task as Task

_HOME = {
    "Document": "vestige.training.data.documents:Document",
    "LoopConfig": "vestige.training.config:LoopConfig",
    "Outcome": "vestige.training.loop:Outcome",
    "Processes": "vestige.training.distributed:Processes",
    "Task": "vestige.training.task:Task",
    "generator_of": "vestige.training.sampler:generator_of",
    "lines_of": "vestige.training.data.documents:lines_of",
    "processes": "vestige.training.distributed:processes",
    "read": "vestige.training.data.documents:read",
    "seed_of": "vestige.training.sampler:seed_of",
    "split": "vestige.training.data.documents:split",
    "train": "vestige.training.loop:train",
    "windows": "vestige.training.data.documents:windows",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    return registry.member(name, _HOME, __name__)
