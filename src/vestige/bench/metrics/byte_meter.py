"""Bytes of live storage of a cache, at rest and at the peak of reading."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from vestige.utils.timing import synchronized_time

_OPAQUE = (str, bytes, int, float, type, nn.Module, PreTrainedConfig, ModuleType, FunctionType, MethodType)


def storage_bytes(held: object) -> int:
    """Return the bytes of all storages below an object, each counted once and whole.

    Lists, dictionaries, attributes and quantised tensors are searched; modules and configs are not. A view counts as
    the whole storage that it keeps alive.
    """
    storages: dict[tuple[str, int], int] = {}
    for tensor in _tensors(held, set()):
        storage = tensor.untyped_storage()
        storages[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(held: Any, visited: set[int]) -> Iterator[Tensor]:
    if held is None or isinstance(held, _OPAQUE) or id(held) in visited:
        return
    visited.add(id(held))
    if isinstance(held, Tensor):
        if not hasattr(held, "__tensor_flatten__"):  # a quantised tensor is a shell around packed data, scale and shift
            yield held
            return
        parts: list[Any] = [getattr(held, name) for name in held.__tensor_flatten__()[0]]
    elif isinstance(held, Mapping):
        parts = list(held.values())
    elif isinstance(held, list | tuple | set | frozenset):
        parts = list(held)
    else:
        parts = list(getattr(held, "__dict__", {}).values())
    for part in parts:
        yield from _tensors(part, visited)


class ByteMeter:
    """Measures the layers of these indices at every update of a cache inside ``with meter.watch(cache):``."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.peak_bytes = 0
        self.overhead_s = 0.0
        """Seconds of the measuring itself."""
        self.heads: dict[int, int] = {}
        """KV heads of each layer that was written to."""
        self.pair_bytes: dict[int, int] = {}
        """Bytes of the keys and values of one token, over the layer's heads, as the model makes them."""

    @contextmanager
    def watch(self, cache: Cache) -> Iterator[None]:
        """Measure a cache at every update; it is as before on exit."""
        update = cache.update

        def measured_update(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            returned = update(keys, values, layer_idx, *args, **kwargs)
            started = synchronized_time(keys.device)
            if layer_idx in self.layers:
                per_token = sum(x.shape[1] * x.shape[3] * x.element_size() for x in (keys, values))
                self.heads[layer_idx], self.pair_bytes[layer_idx] = keys.shape[1], per_token
            # The attention may get a copy in full precision; the activations themselves are no copy.
            copies = [x for x in returned if x is not keys and x is not values]
            self.measure(cache, copies if layer_idx in self.layers else [])
            self.overhead_s += synchronized_time(keys.device) - started
            return returned

        cache.update = measured_update  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del cache.update

    def measure(self, cache: Cache, others: object = None) -> int:
        """Return the bytes of the layers and of other live objects, and update the peak."""
        layers = [cache.layers[i] for i in self.layers if i < len(cache.layers)]
        size = storage_bytes([layers, others])
        self.peak_bytes = max(self.peak_bytes, size)
        return size
