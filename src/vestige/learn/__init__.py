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

_MODULES = {
    "config": ("LoopConfig",),
    "documents": ("Document", "lines_of", "read", "split", "windows"),
    "loop": ("Outcome", "train"),
    "order": ("generator_of", "seed_of"),
    "parallel": ("Processes", "processes"),
    "task": ("Task",),
}
_HOME = {name: f"vestige.learn.{module}:{name}" for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    return registry.member(name, _HOME, __name__)
