"""Saving and loading a cache: a folder with safetensors for tensors and JSON for the rest, without any code.

A folder is written next to its final place and renamed, so that it exists completely or not at all.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from vestige.budget import Budget
from vestige.cache.forward_pass import ForwardPass
from vestige.cache.layer import RaggedLayer
from vestige.cache.query_records import QueryMoments, RingBuffer
from vestige.cache.recording import RecordingSpec
from vestige.cache.schedule import Schedule
from vestige.cache.state import CacheState
from vestige.errors import CacheFileError, ModelError
from vestige.kernels import AttentionScale, packed
from vestige.memory import MEMORIES
from vestige.memory import name_of as memory_name
from vestige.memory import resolve as memory_class
from vestige.memory.base import AbsorbedRanges, LayerMemory, Memory
from vestige.models.layout import check
from vestige.nn.pretrained import digest
from vestige.policies import POLICIES, name_of, resolve
from vestige.policies.base import Policy
from vestige.spans import Span
from vestige.utils.files import new_folder

FORMAT = 7
C = TypeVar("C")
_TENSORS, _METADATA = "cache.safetensors", "cache.json"
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_COUNTERS = ("prepared", "peak_kv_bytes", "evict_s", "annotate_s")


def save(state: CacheState, layers: Sequence[object], path: Path) -> None:
    """Write a cache to a new folder.

    Raises:
        InputError: The folder exists and is not empty, or cannot be written. Nothing is left behind.
        CacheFileError: The policy or the memory has no registered name.
    """
    with new_folder(path, "the cache") as work:
        write(state, layers, work)


def write(state: CacheState, layers: Sequence[object], folder: Path) -> None:
    """Write a cache into an existing folder, for callers that move the folder to its final place.

    Raises:
        CacheFileError: As :func:`save`.
    """
    tensors, plain = _pack(state, layers)
    metadata = {
        "format": FORMAT,
        "model": state.layout.fingerprint(),
        "dtype": str(state.layout.model.dtype),
        "policy": _policy_to_json(state.policy),
        "memory": _memory_to_json(state.memory),
        "trained": _hash_weights(state.policy, state.memory, state.layout.model),
        "absorbed": {b: _spans_to_json(row) for b, row in state.absorbed.ranges.items()},
        "replayable": state.absorbed.replayable,
        "released": _spans_to_json(state.absorbed.released),
        "needs": sorted(state.recording.needs),
        "ring_sizes": dict(state.recording.ring_sizes),
        "writers": [_policy_to_json(writer) for writer in state.recording.writers if isinstance(writer, Policy)],
        "lengths": state.lengths,
        "pins": _spans_to_json(state.pins),
        "erased": _spans_to_json(state.erased),
        "seen": list(state.seen),
        **{name: getattr(state, name) for name in _COUNTERS},
        "schedule": vars(state.schedule),
        "layers": plain,
    }
    save_file(tensors, folder / _TENSORS)
    (folder / _TENSORS).chmod(0o644)  # safetensors makes it readable by its owner only
    metadata["sha256"] = _hash_file(folder / _TENSORS)
    metadata["digest"] = _hash_entries(metadata)
    (folder / _METADATA).write_text(json.dumps(metadata, indent=1))


@dataclass(frozen=True)
class SavedCache:
    """The contents of a folder that was saved for the model.

    Args:
        path: The folder, for messages.
        model: The model that filled the cache.
        metadata: Contents of the JSON file.
        tensors: Contents of the safetensors file.
    """

    path: Path
    model: PreTrainedModel
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def build(self, make: Callable[..., C]) -> C:
        """Return ``make(model, policy, memory=memory)``, an empty cache.

        Raises:
            CacheFileError: Trained weights are missing or differ from those the cache was made with.
        """
        policy = _policy_from_json(self.metadata["policy"])
        memory = _memory_from_json(self.metadata["memory"])
        try:
            cache = make(self.model, policy, memory=memory)
        except ModelError as error:
            raise CacheFileError(f"{self.path} needs trained weights that cannot be had: {error}") from None
        if self.metadata["trained"] != _hash_weights(policy, memory, self.model):
            raise CacheFileError(f"{self.path} was written with other trained weights than lie there now")
        return cache

    def restore(self, state: CacheState, layers: Sequence[object]) -> None:
        """Fill the state and the layers of an empty cache."""
        _restore_state(state, self.metadata, self.tensors)
        for i, plain in enumerate(self.metadata["layers"]):
            inner = {name.partition(".")[2]: x for name, x in self.tensors.items() if name.partition(".")[0] == str(i)}
            layer: Any = layers[i]
            if isinstance(layer, RaggedLayer):
                _restore_ragged(layer, plain, inner)
            else:
                _restore_other(layer, plain, inner)


@contextmanager
def open_saved(path: Path, model: PreTrainedModel) -> Iterator[SavedCache]:
    """Read a folder that :func:`save` wrote; inside, errors of damaged files become a CacheFileError.

    Raises:
        CacheFileError: Missing, damaged, of another format, or made for another model.
    """
    try:
        metadata = json.loads((path / _METADATA).read_text())
        if metadata["format"] != FORMAT:
            raise CacheFileError(f"{path} has format {metadata['format']}, this version of vestige reads {FORMAT}")
        if metadata.pop("digest") != _hash_entries(metadata):
            raise CacheFileError(f"{path} is damaged: {_METADATA} is not the file that was saved")
        if _hash_file(path / _TENSORS) != metadata["sha256"]:
            raise CacheFileError(f"{path} is damaged: {_TENSORS} is not the file that was saved")
        tensors = load_file(path / _TENSORS, device=str(model.device))
        if metadata["model"] != check(model).fingerprint():
            name = model.config.name_or_path
            raise CacheFileError(f"{path} was made for another model or other weights than {name!r}")
        if metadata["dtype"] != str(model.dtype):
            raise CacheFileError(f"{path} was made in {metadata['dtype']}, but the model computes in {model.dtype}")
        yield SavedCache(path, model, metadata, tensors)
    except CacheFileError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheFileError(f"{path} is not a saved cache: no {Path(error.filename).name}") from None
    except Exception as error:  # torch, safetensors and json raise many types for damaged files
        raise CacheFileError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _pack(state: CacheState, layers: Sequence[object]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return all tensors by name, without free slots, and the plain values of each layer."""
    tensors = {"ids": state.history.ids, "real": state.history.real.to(torch.uint8)}
    if state.history.stale is not None:
        tensors["stale"] = state.history.stale
    if state.step is not None:
        tensors["step.positions"] = state.step.positions
    plain = []
    for i, layer in enumerate(layers):
        values, inner = _pack_ragged(layer) if isinstance(layer, RaggedLayer) else _pack_other(layer)
        tensors |= {f"{i}.{name}": tensor for name, tensor in inner.items()}
        plain.append(values)
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, plain


def _pack_ragged(layer: RaggedLayer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not layer.is_initialized:
        return {}, {}
    slots = layer.stored_slots()
    tensors = {f"column.{name}": packed.gather(column, slots) for name, column in layer.columns.items()}
    plain = {name: getattr(layer, name) for name in ("kv_heads", "lengths", "padded_seen", "ragged")}
    tensors |= {f"ring.{name}": ring.data for name, ring in layer.rings.items()}
    plain["floors"] = {name: ring.floor for name, ring in layer.rings.items() if isinstance(ring, RingBuffer)}
    tensors |= {f"memory.{name}": x for name, x in layer.remains.state.items()} if layer.remains else {}
    if layer.attention is not None:
        plain |= {"scaling": layer.attention.scaling, "softcap": layer.attention.softcap}
        if layer.attention.sinks is not None:
            tensors["sinks"] = layer.attention.sinks
    return plain, tensors


def _pack_other(layer: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the plain values and tensors of a layer made by transformers, including dicts one level deep."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            tensors |= {f"{name}/{key}": x for key, x in value.items() if isinstance(x, Tensor)}
            plain[name] = {str(key): x for key, x in value.items() if isinstance(x, bool | int | None)}
        elif isinstance(value, torch.dtype):
            plain[name] = str(value)
        elif isinstance(value, bool | int | float | str | None):
            plain[name] = value
    return plain, tensors


def _restore_state(state: CacheState, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in _COUNTERS:
        setattr(state, name, metadata[name])
    recording = RecordingSpec.of([state.policy, *map(_policy_from_json, metadata["writers"])])
    state.recording = replace(recording, needs=frozenset(metadata["needs"]), ring_sizes=metadata["ring_sizes"])
    state.lengths = metadata["lengths"] and tuple(metadata["lengths"])
    state.pins, state.erased = _spans_from_json(metadata["pins"]), _spans_from_json(metadata["erased"])
    state.absorbed = AbsorbedRanges(
        {int(b): _spans_from_json(row) for b, row in metadata["absorbed"].items()},
        {int(b): tokens for b, tokens in metadata["replayable"].items()},
        _spans_from_json(metadata["released"]),
    )
    state.seen = tuple(metadata["seen"])
    state.schedule = Schedule(**metadata["schedule"])
    if state.seen:
        state.history.add(tensors["ids"].cpu(), tensors["real"].bool())
        state.history.stale = tensors["stale"].cpu() if "stale" in tensors else None
    if "step.positions" in tensors:
        state.step = ForwardPass(1, tensors["step.positions"], state.seen, padded=False, even=False)


def _restore_ragged(layer: RaggedLayer, plain: dict[str, Any], inner: dict[str, Tensor]) -> None:
    if not plain:
        return
    sinks = inner.pop("sinks", None)
    kinds: dict[str, dict[str, Tensor]] = {"column": {}, "ring": {}, "memory": {}}
    for name, tensor in inner.items():
        kind, _, own_name = name.partition(".")
        kinds[kind][own_name] = tensor
    floors = plain["floors"]
    layer.rings = {
        name: RingBuffer(x, floors[name]) if name in floors else QueryMoments(x) for name, x in kinds["ring"].items()
    }
    if kinds["memory"]:
        memory = layer.state.bound_memory
        assert memory is not None, "states are saved with the memory that owns them"
        layer.remains = LayerMemory(memory=memory, layer_idx=layer.layer_idx, state=kinds["memory"])
    if "scaling" in plain:
        layer.attention = AttentionScale(plain["scaling"], plain["softcap"], sinks)
    layer.restore(kinds["column"], plain["lengths"], plain["kv_heads"], plain["padded_seen"], plain["ragged"])


def _restore_other(layer: Any, plain: dict[str, Any], inner: dict[str, Tensor]) -> None:
    for name, value in plain.items():
        if isinstance(value, dict):
            value = {int(key) if key.isdigit() else key: x for key, x in value.items()}
        setattr(layer, name, _DTYPES.get(value, value) if isinstance(value, str) else value)
    for name, tensor in inner.items():
        attribute, _, key = name.partition("/")
        if key:
            getattr(layer, attribute)[int(key) if key.isdigit() else key] = tensor
        else:
            setattr(layer, attribute, tensor)
    first = next((x for x in inner.values() if x.is_floating_point()), None)
    if first is not None:
        layer.device = first.device


def _policy_to_json(policy: Policy) -> dict[str, Any]:
    name = name_of(policy)
    if name not in POLICIES:
        raise CacheFileError(f"a cache of policy {name} cannot be saved: it is not one of {', '.join(POLICIES)}")
    options = _read_options(policy, f"a cache of policy {name}")
    budget = options.pop("budget")
    return {"name": name, "budget": None if budget is None else [budget.kind, budget.amount], "options": options}


def _policy_from_json(saved: dict[str, Any]) -> Policy:
    cls: Any = resolve(saved["name"])
    budget = None if saved["budget"] is None else Budget(*saved["budget"])
    options = {name: _to_tuples(value) for name, value in saved["options"].items()}
    policy: Policy = cls(budget=budget, **options)
    return policy


def _memory_to_json(memory: Memory | None) -> dict[str, Any] | None:
    if memory is None:
        return None
    if (name := memory_name(memory)) not in MEMORIES:
        raise CacheFileError(f"a cache with memory {name} cannot be saved: it is not one of {', '.join(MEMORIES)}")
    return {"name": name, "options": _read_options(memory, f"a cache with memory {name}")}


def _read_options(owner: Any, what: str) -> dict[str, Any]:
    options = {field.name: getattr(owner, field.name) for field in dataclasses.fields(owner)}
    for option, value in options.items():
        if not isinstance(value, str | bool | int | float | tuple | Budget | None):
            raise CacheFileError(f"{what} cannot be saved with {option} at hand: save them and name their folder")
    return options


def _memory_from_json(saved: dict[str, Any] | None) -> Memory | None:
    cls: Any = None if saved is None else memory_class(saved["name"])
    return None if saved is None else cls(**saved["options"])


def _hash_weights(policy: Policy, memory: Memory | None, model: PreTrainedModel) -> list[str]:
    """Return hashes of the trained weights of a policy and a memory."""
    return [digest(owner, model) for owner in (policy, memory)]


def _spans_to_json(spans: Sequence[Span]) -> list[list[int]]:
    return [[span.start, span.end] for span in spans]


def _spans_from_json(pairs: Sequence[Sequence[int]]) -> tuple[Span, ...]:
    return tuple(Span(*pair) for pair in pairs)


def _to_tuples(value: Any) -> Any:
    """Turn JSON lists back into tuples."""
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


def _hash_entries(metadata: dict[str, Any]) -> str:
    """Return the hash of all metadata entries."""
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
