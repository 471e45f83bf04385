"""Invariant 7: save + load is the identity. And a folder is there completely or not at all, and never runs code."""

import json
import pickle
from dataclasses import dataclass
from functools import cache as cached
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vestige import Budget, CacheFileError, InputError, KVCache, Span, attach, policies, prefill
from vestige.cache import serialization
from vestige.cache.layer import RaggedLayer
from vestige.kernels import AttentionScale
from vestige.models.compat import cache_argument
from vestige.policies import POLICIES
from vestige.testing import left_padded, random_ids, tiny

SMALL = {"sink": 2, "window": 4, "every": 8}
ARCHITECTURES = ("llama", "gemma3", "gpt_oss")  # plain; sliding layers beside; sliding layers and attention sinks


@cached
def model_of(name: str):
    return tiny(name)


def snapkv(budget: Budget | None = None, **changes: Any) -> policies.SnapKV:
    return policies.SnapKV(budget=budget or Budget.tokens(16), **(SMALL | {"observed": 8, "share": "model"} | changes))


@torch.no_grad()
def read(model, policy, *, batch: int = 1, length: int = 40, pads: bool = False) -> KVCache:
    """Return a cache that has read random ids in chunks of 16."""
    cache = KVCache(model, policy)
    ids, mask = left_padded(model, [length, length - 15][:batch]) if pads else (random_ids(model, batch, length), None)
    prefill(model, ids, cache, chunk=16, attention_mask=mask)
    return cache


@torch.no_grad()
def go_on(model, cache: KVCache, steps: int) -> tuple[Tensor, Tensor]:
    """Generate greedily; return the new tokens and their logits."""
    batch = len(cache.seen)
    ids = torch.cat([cache.ids, torch.arange(5, 5 + batch)[:, None]], 1)
    mask = torch.cat([cache.real, torch.ones(batch, 1, dtype=torch.bool)], 1).long()
    out: Any = model.generate(
        ids,
        attention_mask=mask,
        **cache_argument(cache),
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits)


def plain(value: Any) -> Any:
    """Return a value in a form that == compares: tensors by dtype, shape and every bit."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().flatten().view(torch.uint8).tolist()
    if isinstance(value, AttentionScale):
        value = vars(value)
    return {key: plain(x) for key, x in value.items()} if isinstance(value, dict) else value


def pairs(layer: RaggedLayer) -> list[dict[str, Any]]:
    """Return the columns of each row, without the slack."""
    ends = zip(layer.starts, layer.lengths, strict=True)
    return [{name: plain(x[a : a + n].clone()) for name, x in layer.columns.items()} for a, n in ends]


def assert_equal(one: KVCache, other: KVCache) -> None:
    """Assert that two caches agree in everything but where their slack lies."""
    for name in ("policy", "seen", "held", "ragged", "padded"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("schedule", "pins", "erased", "lengths", "recording", "prepared", "growth_slots"):
        assert getattr(one.state, name) == getattr(other.state, name), name
    assert type(one.policy) is type(other.policy) and one.policy.budget == other.policy.budget
    assert torch.equal(one.ids, other.ids) and torch.equal(one.real, other.real)
    assert (one.ids.dtype, one.real.dtype) == (other.ids.dtype, other.real.dtype)
    assert one.state.pair_limits() == other.state.pair_limits()
    assert len(one.layers) == len(other.layers)
    for a, b in zip(one.layers, other.layers, strict=True):
        assert type(a) is type(b)
        if isinstance(a, RaggedLayer):
            assert pairs(a) == pairs(b)
            assert a.kv_heads == b.kv_heads and a.padded_seen == b.padded_seen and a.ragged == b.ragged
            assert (a.dtype, a.device, a.is_initialized) == (b.dtype, b.device, b.is_initialized)
            assert {n: plain(vars(r)) for n, r in a.rings.items()} == {n: plain(vars(r)) for n, r in b.rings.items()}
            assert plain(a.attention) == plain(b.attention)
        else:
            assert plain(vars(a)) == plain(vars(b))
    for name in ("full", "full_kv_bytes", "other_kv_bytes", "budget_total", "policy", "share", "layers"):
        assert getattr(one.report(), name) == getattr(other.report(), name), name


def assert_survives(model, cache: KVCache, folder: Path, steps: int = 12) -> KVCache:
    """Save, load, compare, go on with both, compare again: tokens, logits and the caches that result."""
    with attach(model):
        cache.save(folder)
        loaded = KVCache.load(folder, model)
        assert_equal(cache, loaded)
        assert cache.state.evict_s == loaded.state.evict_s and cache.state.peak_kv_bytes <= loaded.state.peak_kv_bytes
        tokens, logits = go_on(model, cache, steps)
        tokens_loaded, logits_loaded = go_on(model, loaded, steps)
    assert torch.equal(tokens, tokens_loaded)
    assert torch.equal(logits, logits_loaded)
    assert_equal(cache, loaded)
    return loaded


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cache_that_was_evicted_survives(name, tmp_path):
    model = model_of(name)
    with attach(model):
        cache = read(model, snapkv())
    assert cache.ragged and cache.held == 16 * cache.state.footprint().rows
    assert_survives(model, cache, tmp_path / "kept")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_left_padded_batch_survives(name, tmp_path):
    model = model_of(name)
    with attach(model):
        cache = read(model, snapkv(), batch=2, pads=True)
    assert cache.padded and cache.seen == (40, 25)
    assert_survives(model, cache, tmp_path / "kept")


@pytest.mark.parametrize(("name", "pads"), [*((name, False) for name in ARCHITECTURES), ("llama", True)])
def test_a_dense_cache_survives_and_is_evicted_later_as_it_would_have_been(name, pads, tmp_path):
    model = model_of(name)
    with attach(model):
        cache = read(model, snapkv(Budget.tokens(40)), batch=2, pads=pads)
    assert not cache.ragged and cache.padded == pads
    loaded = assert_survives(model, cache, tmp_path / "kept")
    assert loaded.ragged


@pytest.mark.parametrize(("name", "pads"), [*((name, False) for name in ARCHITECTURES), ("gemma3", True)])
def test_a_cache_in_the_middle_of_generation_survives(name, pads, tmp_path):
    model = model_of(name)
    with attach(model):
        cache = read(model, snapkv(share="head"), batch=2, pads=pads)
        go_on(model, cache, 12)  # one settle, and some tokens towards the next
    assert 0 < cache.state.schedule.generated < 8
    assert_survives(model, cache, tmp_path / "kept")


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "snapkv"])
def test_every_policy_survives_with_its_options(name, tmp_path):
    cls: Any = policies.resolve(name)
    options: dict[str, Any] = {"every": 9, "sink": 1, "window": 3} | ({"seed": 7} if name == "random" else {})
    policy = cls(budget=None if name == "full" else Budget.fraction(0.4), **options)
    model = model_of("llama")
    with attach(model):
        cache = read(model, policy)
        go_on(model, cache, 12)
    loaded = assert_survives(model, cache, tmp_path / "kept")
    assert loaded.policy == policy and loaded.ragged == (name != "full")


@pytest.mark.parametrize("budget", [Budget.tokens(17), Budget.fraction(1 / 3), Budget.bytes(20_000.5)])
def test_budgets_survive_to_the_last_digit(budget, tmp_path):
    model = model_of("llama")
    with attach(model):
        cache = read(model, snapkv(budget))
    assert assert_survives(model, cache, tmp_path / "kept", steps=10).policy.budget == budget


def test_pins_an_announced_length_and_what_observers_need_survive(tmp_path):
    model = model_of("llama")
    random = policies.Random(budget=Budget.fraction(0.5), **SMALL)
    cache = KVCache(model, random, observers=[snapkv()])
    cache.pin(Span(9, 13))
    with attach(model), torch.no_grad():
        prefill(model, random_ids(model, 1, 40), cache, chunk=16, length=60)
    loaded = assert_survives(model, cache, tmp_path / "kept")
    assert loaded.state.lengths == (60,) and loaded.state.pins == (Span(9, 13),)
    assert loaded.fork(snapkv()).policy == snapkv()  # the queries it needs were kept


def test_linear_layers_beside_survive(tmp_path):
    linear: dict[str, Any] = {f"linear_{what}": 2 for what in ("num_key_heads", "num_value_heads")}
    linear |= {f"linear_{what}": 16 for what in ("key_head_dim", "value_head_dim")}
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    experts["experts_implementation"] = "eager"
    model = tiny("llama", model_type="qwen3_next", layer_types=kinds, **linear, **experts)
    with attach(model):
        cache = read(model, snapkv())
        go_on(model, cache, 3)
    assert cache.report().other_kv_bytes
    assert_survives(model, cache, tmp_path / "kept")


def test_an_own_dtype_survives(tmp_path):
    model = tiny("llama", dtype=torch.bfloat16)
    with attach(model):
        cache = read(model, snapkv())
    loaded = assert_survives(model, cache, tmp_path / "kept", steps=10)
    assert {layer.columns["keys"].dtype for layer in loaded.evictable} == {torch.bfloat16}


def test_a_cache_that_has_read_nothing_survives(tmp_path):
    model = model_of("gemma3")
    with attach(model):
        KVCache(model, snapkv()).save(tmp_path / "kept")
        loaded = KVCache.load(tmp_path / "kept", model)
        assert loaded.seen == () and loaded.held == 0
        prefill(model, random_ids(model, 1, 40), loaded, chunk=16)
        assert_equal(read(model, snapkv()), loaded)


def test_a_second_turn_goes_on_from_a_loaded_cache(tmp_path):
    model, more = model_of("llama"), random_ids(128, 1, 30, seed=5)
    with attach(model), torch.no_grad():
        cache = read(model, snapkv())
        cache.save(tmp_path / "kept")
        loaded = KVCache.load(tmp_path / "kept", model)
        logits = [prefill(model, more, each, chunk=16) for each in (cache, loaded)]
    assert torch.equal(*logits)
    assert_equal(cache, loaded)


def test_cropping_and_reordering_before_saving_survive(tmp_path):
    model = model_of("llama")
    with attach(model):
        cropped, reordered = read(model, snapkv(), batch=2), read(model, snapkv(), batch=2)
        cropped.crop(-5)
        reordered.batch_select_indices(torch.tensor([1, 0, 1]))
    assert_survives(model, cropped, tmp_path / "cropped")
    assert_survives(model, reordered, tmp_path / "reordered")


def test_saving_changes_nothing_and_saving_again_gives_the_same_files(tmp_path):
    model = model_of("gpt_oss")
    with attach(model):
        cache = read(model, snapkv())
        before = cache.fork()
        cache.save(tmp_path / "one")
        KVCache.load(tmp_path / "one", model).save(tmp_path / "two")
    assert_equal(before, cache)
    tensors = [(tmp_path / folder / "cache.safetensors").read_bytes() for folder in ("one", "two")]
    assert tensors[0] == tensors[1]


# The folder


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def cache() -> KVCache:
    """Return a cache that tests save and never change."""
    model = model_of("llama")
    with attach(model):
        return read(model, snapkv())


@pytest.fixture
def kept(cache, tmp_path) -> Path:
    cache.save(tmp_path / "kept")
    return tmp_path / "kept"


def test_a_folder_holds_safetensors_and_json_only(kept):
    assert contents(kept.parent) == ["kept", "kept/cache.json", "kept/cache.safetensors"]
    json.loads((kept / "cache.json").read_text())


def test_parents_are_made_and_an_empty_folder_is_filled(cache, tmp_path):
    cache.save(tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    cache.save(str(tmp_path / "empty"))
    for folder in (tmp_path / "a" / "b", tmp_path / "empty"):
        assert KVCache.load(folder, model_of("llama")).held == cache.held


def test_others_may_read_a_folder_as_far_as_its_owner_lets_them(kept):
    modes = {path.name: path.stat().st_mode & 0o777 for path in kept.iterdir()}
    assert modes["cache.safetensors"] == modes["cache.json"]


@dataclass(frozen=True)
class Outside(policies.Random):
    """A policy of a user's own."""


def test_a_policy_that_loading_could_not_find_is_refused_when_saving(tmp_path):
    model = model_of("llama")
    with attach(model):
        cache = read(model, Outside(budget=Budget.tokens(16), **SMALL))
    with pytest.raises(CacheFileError, match="policy Outside cannot be saved.*full, "):
        cache.save(tmp_path / "new" / "kept")
    assert contents(tmp_path) == []


def test_a_folder_with_something_in_it_is_refused_and_left_alone(cache, kept):
    (kept.parent / "file").write_text("x")
    before = {path: path.read_bytes() for path in kept.parent.rglob("*") if path.is_file()}
    for path in (kept, kept.parent / "file", kept.parent):
        with pytest.raises(InputError, match="exists and is not empty"):
            cache.save(path)
    assert {path: path.read_bytes() for path in kept.parent.rglob("*") if path.is_file()} == before


def half_written(tensors: Any, path: Path) -> None:
    Path(path).write_bytes(b"half")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["kept", "new/kept", "empty"])
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing_behind(cache, tmp_path, monkeypatch, where):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(serialization, "save_file", half_written)
    with pytest.raises(InputError, match="cannot write the cache to .*No space left on device"):
        cache.save(tmp_path / where)
    assert contents(tmp_path) == ["empty"]


@pytest.mark.parametrize("name", ["cache.serialization._hash_file", "utils.files.os.replace"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_in_the_last_steps_leaves_nothing_behind(cache, tmp_path, monkeypatch, name, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(f"vestige.{name}", fail)
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
        cache.save(tmp_path / "kept")
    assert contents(tmp_path) == []


def test_a_place_that_cannot_be_written_is_one_line(cache, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write the cache to") as caught:
        cache.save(tmp_path / "file" / "kept")
    assert "\n" not in str(caught.value)


# Loading


def refused(folder: Path, model=None) -> str:
    """Return the one line that loading is refused with."""
    with pytest.raises(CacheFileError) as caught:
        KVCache.load(folder, model_of("llama") if model is None else model)
    line = str(caught.value)
    assert "\n" not in line and str(folder) in line and len(line) < 400, line
    return line


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of the JSON file."""
    path = folder / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_missing_is_named(kept, tmp_path):
    assert "is not a saved cache: no cache.json" in refused(tmp_path / "gone")
    (kept / "cache.safetensors").unlink()
    assert "is not a saved cache: no cache.safetensors" in refused(kept)
    (tmp_path / "file").write_text("x")
    assert "is not a saved cache" in refused(tmp_path / "file")


@pytest.mark.parametrize("at", [0, 8, 300, -1])
def test_one_changed_bit_among_the_tensors_is_noticed(kept, at):
    content = bytearray((kept / "cache.safetensors").read_bytes())
    content[at] ^= 1
    (kept / "cache.safetensors").write_bytes(content)
    assert "is damaged" in refused(kept)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
@pytest.mark.parametrize("name", ["cache.safetensors", "cache.json"])
def test_a_truncated_file_is_noticed(kept, name, length):
    (kept / name).write_bytes((kept / name).read_bytes()[:length])
    assert "is damaged" in refused(kept)


def test_another_model_or_other_weights_are_noticed(kept):
    for other in (tiny("llama", seed=1), tiny("qwen3"), tiny("llama", num_hidden_layers=2)):
        assert "made for another model or other weights" in refused(kept, other)


def test_the_same_model_loaded_again_is_the_same_model(kept):
    assert KVCache.load(kept, tiny("llama")).seen == (40,)


def test_the_same_model_in_another_dtype_is_named(kept):
    assert "was made in torch.float32, but the model computes in torch.bfloat16" in refused(
        kept, tiny("llama").to(torch.bfloat16)
    )


@pytest.mark.parametrize("number", [0, 6, 8, "7", None])
def test_an_unknown_format_is_named(kept, number):
    edit(kept, format=number)
    assert f"has format {number}, this version of vestige reads 7" in refused(kept)


def test_a_policy_that_this_version_does_not_have_is_named(kept, monkeypatch):
    monkeypatch.delitem(POLICIES, "snapkv")
    assert "unknown policy 'snapkv'" in refused(kept)


POLICY = {"name": "snapkv", "budget": ["tokens", 16], "options": {}}
LAYER = {"kv_heads": 2, "padded_seen": 40, "ragged": True}
EDITS: dict[str, dict[str, Any]] = {
    "unknown policy": {"policy": POLICY | {"name": "snapvk"}},
    "a policy that is no policy": {"policy": POLICY | {"name": "os:system"}},
    "unknown option": {"policy": POLICY | {"options": {"color": "red"}}},
    "option of another kind": {"policy": POLICY | {"options": {"every": "often"}}},
    "impossible budget": {"policy": POLICY | {"budget": ["tokens", -1]}},
    "no policy": {"policy": None},
    "too many layers": {"layers": [{}] * 9},
    "lengths that do not fit": {"layers": [LAYER | {"lengths": [99, 99]}] * 3},
    "lengths of words": {"layers": [LAYER | {"lengths": ["a", "b"]}] * 3},
    "seen of another batch": {"seen": [40, 40]},
    "less seen than read": {"seen": [10]},
    "pins of words": {"pins": ["ab"]},
    "unknown clock": {"schedule": {"tick": 1}},
    "no digest": {"sha256": None},
}


@pytest.mark.parametrize("case", EDITS)
def test_json_that_was_edited_is_refused(kept, case):
    edit(kept, **EDITS[case])
    refused(kept)


ENTRIES = (
    "format", "model", "dtype", "policy", "trained", "replayable", "released", "needs", "ring_sizes", "writers",
    "lengths", "pins", "erased", "seen", "prepared", "peak_kv_bytes", "evict_s", "schedule", "layers", "sha256",
)  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_json_without_an_entry_is_refused(kept, name):
    path = kept / "cache.json"
    books = json.loads(path.read_text())
    del books[name]
    path.write_text(json.dumps(books))
    refused(kept)


def test_a_refused_load_leaves_the_files_as_they_are(kept):
    edit(kept, format=0)
    before = {path: path.read_bytes() for path in kept.iterdir()}
    refused(kept)
    assert {path: path.read_bytes() for path in kept.iterdir()} == before


def test_nothing_is_ever_unpickled(cache, tmp_path, monkeypatch):
    def unpickled(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read or written")

    for module, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "dumps")):
        monkeypatch.setattr(module, name, unpickled)
    monkeypatch.setattr(pickle, "Unpickler", unpickled)
    cache.save(tmp_path / "kept")
    assert KVCache.load(tmp_path / "kept", model_of("llama")).held == cache.held
