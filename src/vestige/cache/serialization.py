"""Saving a cache to a folder and loading it: safetensors for tensors, JSON for the rest; no code is ever run.

A folder is written beside its final place and renamed, so it is there completely or not at all.
"""

import dataclasses
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from vestige.budget import Budget
from vestige.cache.forward_pass import ForwardPass
from vestige.cache.kv_cache import KVCache
from vestige.cache.layer import RaggedLayer
from vestige.cache.query_records import QueryMoments, RingBuffer
from vestige.cache.recording import RecordingSpec
from vestige.cache.schedule import Schedule
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
_TENSORS, _BOOKS = "cache.safetensors", "cache.json"
_DTYPES = {str(one): one for one in vars(torch).values() if isinstance(one, torch.dtype)}


def save(cache: KVCache, path: Path) -> None:
    """Write a cache to a new folder.

    Raises:
        InputError: The folder exists and is not empty, or cannot be written. Nothing is left behind.
        CacheFileError: The policy or the memory has no name that loading could find.
    """
    with new_folder(path, "the cache") as work:
        write(cache, work)


def write(cache: KVCache, folder: Path) -> None:
    """Write a cache into a folder that takes its place later, as part of something larger.

    Raises:
        CacheFileError: As :func:`save`.
    """
    tensors, layers = _pack(cache)
    books = {
        "format": FORMAT,
        "model": cache.anatomy.fingerprint(),
        "dtype": str(cache.anatomy.model.dtype),
        "policy": _policy_to_json(cache.policy),
        "memory": _memory_to_json(cache.memory),
        "trained": [digest(one, cache.anatomy.model) for one in (cache.policy, cache.memory)],
        "absorbed": {b: [[one.start, one.end] for one in row] for b, row in cache.absorbed.ranges.items()},
        "replayable": cache.absorbed.replayable,
        "released": [[span.start, span.end] for span in cache.absorbed.released],
        "needs": sorted(cache.recording.needs),
        "ring_sizes": dict(cache.recording.ring_sizes),
        "writers": [_policy_to_json(one) for one in cache.recording.writers if isinstance(one, Policy)],
        "lengths": cache.lengths,
        "pins": [[span.start, span.end] for span in cache.pins],
        "erased": [[span.start, span.end] for span in cache.erased],
        "seen": list(cache.seen),
        "prepared": cache.prepared,
        "peak_kv_bytes": cache.peak_kv_bytes,
        "evict_s": cache.evict_s,
        "annotate_s": cache.annotate_s,
        "schedule": vars(cache.schedule),
        "layers": layers,
    }
    save_file(tensors, folder / _TENSORS)
    (folder / _TENSORS).chmod(0o644)  # safetensors leaves it to its owner alone
    books["sha256"] = _sha256(folder / _TENSORS)
    books["digest"] = _digest(books)
    (folder / _BOOKS).write_text(json.dumps(books, indent=1))


def load(path: Path, model: PreTrainedModel) -> KVCache:
    """Read a cache that :func:`save` wrote for the same model.

    Raises:
        CacheFileError: Missing, damaged, of another format, or made for another model.
    """
    try:
        books = json.loads((path / _BOOKS).read_text())
        if books["format"] != FORMAT:
            raise CacheFileError(f"{path} has format {books['format']}, this version of vestige reads {FORMAT}")
        if books.pop("digest") != _digest(books):
            raise CacheFileError(f"{path} is damaged: {_BOOKS} is not the file that was saved")
        if _sha256(path / _TENSORS) != books["sha256"]:
            raise CacheFileError(f"{path} is damaged: {_TENSORS} is not the file that was saved")
        tensors = load_file(path / _TENSORS, device=str(model.device))
        return _unpack(books, tensors, model, path)
    except CacheFileError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheFileError(f"{path} is not a saved cache: no {Path(error.filename).name}") from None
    except Exception as error:  # a damaged file makes a dozen types come out of torch, safetensors and json
        raise CacheFileError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _pack(cache: KVCache) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return all tensors by name, pairs without their slack, and each layer's plain values."""
    tensors = {"ids": cache.ids, "real": cache.real.to(torch.uint8)}
    if cache.fed.stale is not None:
        tensors["stale"] = cache.fed.stale
    if cache.step is not None:
        tensors["step.positions"] = cache.step.positions
    layers = []
    for i, layer in enumerate(cache.layers):
        plain, inner = _ragged_parts(layer) if isinstance(layer, RaggedLayer) else _foreign_parts(layer)
        tensors |= {f"{i}.{name}": tensor for name, tensor in inner.items()}
        layers.append(plain)
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, layers


def _ragged_parts(layer: RaggedLayer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not layer.is_initialized:
        return {}, {}
    slots = packed.packed_slots(layer.starts, layer.lengths, layer.device)
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


def _foreign_parts(layer: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the state of a layer that transformers made, dicts of states one level deep."""
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


def _unpack(books: dict[str, Any], tensors: dict[str, Tensor], model: PreTrainedModel, path: Path) -> KVCache:
    if books["model"] != check(model).fingerprint():
        raise CacheFileError(f"{path} was made for another model or other weights than {model.config.name_or_path!r}")
    if books["dtype"] != str(model.dtype):
        raise CacheFileError(f"{path} was made in {books['dtype']}, but the model computes in {model.dtype}")
    policy, memory = _policy_from_json(books["policy"]), _memory_from_json(books["memory"])
    try:
        cache = KVCache(model, policy, memory=memory)
    except ModelError as error:
        raise CacheFileError(f"{path} needs trained weights that cannot be had: {error}") from None
    if books["trained"] != [digest(one, model) for one in (policy, memory)]:
        raise CacheFileError(f"{path} was written with other trained weights than lie there now")
    for name in ("prepared", "peak_kv_bytes", "evict_s", "annotate_s"):
        setattr(cache, name, books[name])
    recording = RecordingSpec.of([cache.policy, *map(_policy_from_json, books["writers"])])
    cache.recording = replace(recording, needs=frozenset(books["needs"]), ring_sizes=books["ring_sizes"])
    cache.lengths = books["lengths"] and tuple(books["lengths"])
    cache.pins, cache.erased, released = (
        tuple(Span(*span) for span in books[name]) for name in ("pins", "erased", "released")
    )
    cache.absorbed = AbsorbedRanges(
        {int(b): tuple(Span(*x) for x in row) for b, row in books["absorbed"].items()},
        {int(b): tokens for b, tokens in books["replayable"].items()},
        released,
    )
    cache.seen = tuple(books["seen"])
    cache.schedule = Schedule(**books["schedule"])
    if books["seen"]:
        cache.fed.add(tensors["ids"].cpu(), tensors["real"].bool())
        cache.fed.stale = tensors["stale"].cpu() if "stale" in tensors else None
    if "step.positions" in tensors:
        cache.step = ForwardPass(1, tensors["step.positions"], cache.seen, padded=False, even=False)
    for i, plain in enumerate(books["layers"]):
        inner = {name.partition(".")[2]: x for name, x in tensors.items() if name.partition(".")[0] == str(i)}
        layer: Any = cache.layers[i]
        if isinstance(layer, RaggedLayer):
            _restore_ragged(layer, plain, inner)
        else:
            _restore_foreign(layer, plain, inner)
    return cache


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
        memory = layer.cache.bound_memory
        assert memory is not None, "states are saved with the memory that owns them"
        layer.remains = LayerMemory(memory=memory, layer_idx=layer.layer_idx, state=kinds["memory"])
    if "scaling" in plain:
        layer.attention = AttentionScale(plain["scaling"], plain["softcap"], sinks)
    layer.restore(kinds["column"], plain["lengths"], plain["kv_heads"], plain["padded_seen"], plain["ragged"])


def _restore_foreign(layer: Any, plain: dict[str, Any], inner: dict[str, Tensor]) -> None:
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
    options = _options(policy, f"a cache of policy {name}")
    budget = options.pop("budget")
    return {"name": name, "budget": None if budget is None else [budget.kind, budget.amount], "options": options}


def _policy_from_json(saved: dict[str, Any]) -> Policy:
    cls: Any = resolve(saved["name"])
    budget = None if saved["budget"] is None else Budget(*saved["budget"])
    options = {name: _frozen(value) for name, value in saved["options"].items()}
    policy: Policy = cls(budget=budget, **options)
    return policy


def _memory_to_json(memory: Memory | None) -> dict[str, Any] | None:
    if memory is None:
        return None
    if (name := memory_name(memory)) not in MEMORIES:
        raise CacheFileError(f"a cache with memory {name} cannot be saved: it is not one of {', '.join(MEMORIES)}")
    return {"name": name, "options": _options(memory, f"a cache with memory {name}")}


def _options(one: Any, what: str) -> dict[str, Any]:
    options = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
    for option, value in options.items():
        if not isinstance(value, str | bool | int | float | tuple | Budget | None):
            raise CacheFileError(f"{what} cannot be saved with {option} at hand: save them and name their folder")
    return options


def _memory_from_json(saved: dict[str, Any] | None) -> Memory | None:
    cls: Any = None if saved is None else memory_class(saved["name"])
    return None if saved is None else cls(**saved["options"])


def _frozen(value: Any) -> Any:
    """Return tuples for the lists that JSON made of them."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _digest(books: dict[str, Any]) -> str:
    """Return the hash of all other entries."""
    return hashlib.sha256(json.dumps(books, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
