"""Copies and tensors of layers made by transformers (sliding, linear, shared), whatever their attributes are."""

import copy
from typing import Any

from torch import Tensor


def copy_layer(layer: Any) -> Any:
    """Return a copy of a layer made by transformers that shares no tensors."""
    copied = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(copied, name, {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()})
        elif isinstance(value, list | tuple):
            setattr(copied, name, type(value)(v.clone() if isinstance(v, Tensor) else v for v in value))
        elif isinstance(value, Tensor):
            setattr(copied, name, value.clone())
    return copied


def find_tensors(layer: Any) -> list[Tensor]:
    """Return the tensors of a layer made by transformers, those in dicts and lists included."""
    found: list[Tensor] = []
    for value in vars(layer).values():
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        found += [x for x in inner if isinstance(x, Tensor)]
    return found
