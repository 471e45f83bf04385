"""Turning keys and queries, and back: judged by what each architecture's own code was seen to do."""

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vestige import Budget, KVCache, ModelError, attach, check, policies
from vestige.models.compat import cache_argument
from vestige.testing import TINY, random_ids, tiny, tiny_vl

NAMES = sorted(TINY)


@contextmanager
def spied(model: Any) -> Iterator[dict[int, list[tuple[Tensor, Tensor]]]]:
    """Record, by layer, what the model's own code turned: each ``batch heads tokens head_dim`` before and after."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    current: list[int] = []
    anatomy = check(model)
    home = sys.modules[type(next(iter(anatomy.attentions.values()))).__module__]
    original = home.apply_rotary_pos_emb

    def spy(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        pairs = [(args[0], result)] if isinstance(result, Tensor) else zip(args[:2], result, strict=True)
        heads_last = kwargs.get("unsqueeze_dim", 1) == 2
        found[current[-1]] += [(a.transpose(1, 2), b.transpose(1, 2)) if heads_last else (a, b) for a, b in pairs]
        return result

    attentions = [m for m in anatomy.decoder.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    hooks = [m.register_forward_pre_hook(lambda m, _: current.append(m.layer_idx)) for m in attentions]
    home.apply_rotary_pos_emb = spy
    try:
        yield found
    finally:
        home.apply_rotary_pos_emb = original
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", NAMES)
def test_queries_and_keys_are_turned_back_to_what_the_projections_gave(name):
    model = tiny(name)
    rope, ids = check(model).rope(), random_ids(model, 2, 12)
    positions = torch.stack([torch.arange(12), torch.arange(30, 42)])
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), spied(model) as found:
        model(ids, position_ids=positions, **cache_argument(cache), attention_mask=torch.ones_like(ids))
    for layer_idx in rope.layers:
        stored: Any = cache.layers[layer_idx]
        if name == "smollm3" and layer_idx == 3:  # has no RoPE: its code turned nothing
            assert layer_idx not in found
            assert torch.equal(rope.unrotate(stored.keys, positions, layer_idx), stored.keys)
            continue
        queries, keys = found[layer_idx]
        assert torch.equal(keys[1], stored.keys)
        for before, after in (queries, keys):
            assert (before - after).abs().max() > 0.05, "the layer turned nothing: the test would prove nothing"
            torch.testing.assert_close(rope.unrotate(after, positions, layer_idx), before, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(rope.rotate(before, positions, layer_idx), after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_turning_and_turning_back_is_the_identity(name, dtype):
    rope = check(tiny(name, dtype=dtype)).rope()
    x = torch.randn(3, 7, 32 if name == "gemma4" else 16, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([0, 3, 50, 200, 7, 7, 511])
    for layer_idx in rope.layers:
        torch.testing.assert_close(rope.unrotate(rope.rotate(x, at, layer_idx), at, layer_idx), x, atol=1e-5, rtol=1e-4)
        assert rope.rotate(x.bfloat16(), at, layer_idx).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "glm4", "gpt_oss", "gemma4", "smollm3"])
def test_the_averaged_rotation_is_the_mean_over_positions_one_by_one(name):
    rope = check(tiny(name)).rope()
    x = torch.randn(2, 3, 32 if name == "gemma4" else 16, generator=torch.Generator().manual_seed(1))
    for layer_idx in rope.layers:
        one_by_one = [rope.rotate(x[..., None, :], torch.tensor([p]), layer_idx)[..., 0, :] for p in range(40, 49)]
        expected = torch.stack(one_by_one).mean(0)
        torch.testing.assert_close(rope.averaged(x, 40, 9, layer_idx), expected, atol=1e-5, rtol=1e-5)


def test_a_key_moves_from_one_position_to_another():
    model = tiny("llama")
    rope, keys = check(model).rope(), []
    for start in (3, 90):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(random_ids(model, 1, 5), position_ids=torch.arange(start, start + 5)[None], **cache_argument(cache))
        keys.append(cache.layers[0].keys)
    here, there = (torch.arange(start, start + 5) for start in (3, 90))
    moved = rope.rotate(rope.unrotate(keys[0], here, 0), there, 0)
    torch.testing.assert_close(moved, keys[1], atol=1e-5, rtol=1e-5)
    assert (keys[0] - keys[1]).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16), (2, 3, 5, 16), (2, 3, 4, 5, 16)])
def test_leading_axes_do_not_matter(shape):
    rope = check(tiny("llama")).rope()
    x, at = torch.randn(shape, generator=torch.Generator().manual_seed(2)), torch.arange(5) * 3
    flat = torch.stack([rope.rotate(row, at, 0) for row in x.reshape(-1, 5, 16)]).reshape(shape)
    torch.testing.assert_close(rope.rotate(x, at, 0), flat)
    if len(shape) > 2:
        torch.testing.assert_close(rope.rotate(x, at.expand(shape[0], 5), 0), flat)
    assert rope.rotate(x[..., :0, :], at[:0], 0).shape == (*shape[:-2], 0, 16)


def test_batch_rows_have_their_own_positions():
    rope = check(tiny("llama")).rope()
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(3))
    at = torch.tensor([[0, 1, 2, 3], [9, 40, 41, 42]])
    expected = torch.stack([rope.rotate(row, p, 0) for row, p in zip(x, at, strict=True)])
    torch.testing.assert_close(rope.rotate(x, at, 0), expected)


def test_embeddings_are_those_that_the_decoder_hands_out():
    model, given = tiny("gemma3"), {}
    rope, layer_idx = check(model).rope(), check(model).evictable[0]
    check(model).attentions[layer_idx].register_forward_pre_hook(
        lambda _, __, kwargs: given.update(kwargs), with_kwargs=True
    )
    ids = random_ids(model, 1, 6)
    with torch.no_grad():
        model(ids)
    found = rope.embeddings(given["hidden_states"], torch.arange(6)[None], layer_idx)
    assert all(torch.equal(a, b) for a, b in zip(found, given["position_embeddings"], strict=True))


def test_it_is_found_out_once_and_leaves_the_model_as_it_was():
    model = tiny("gpt_oss")
    ids = random_ids(model, 1, 9)
    with torch.no_grad():
        before = model(ids).logits
        rope = check(model).rope()
        with attach(model):
            assert check(model).rope() is rope
        assert torch.equal(model(ids).logits, before)


def test_it_is_found_on_an_attached_model():
    model = tiny("gemma2")
    with attach(model):
        assert sorted(check(model).rope().layers) == [1, 3]


# Refusals.


@pytest.mark.parametrize("name", ["expected_attention", "compactor"])
def test_positions_of_several_axes_are_refused_before_anything_is_read(name):
    model, _ = tiny_vl()
    with pytest.raises(ModelError, match=r"Qwen2_5_VL.* cannot be turned back .*: their positions have several axes"):
        KVCache(model, policies.resolve(name)(budget=Budget.tokens(64)))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_length_are_refused(kind):
    model = tiny("llama")
    model.config.rope_parameters["rope_type"] = kind
    with pytest.raises(ModelError, match=f"LlamaForCausalLM.* depend on the length of the text \\(rope_type '{kind}'"):
        check(model).rope()


def test_a_decoder_without_rotary_embeddings_is_refused():
    model = tiny("llama")
    del model.model.rotary_emb
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.* has no rotary_emb"):
        check(model).rope()


def test_a_layer_that_turns_its_keys_in_another_way_is_refused():
    model = tiny("llama")

    def twice(_: Any, args: Any, kwargs: Any) -> Any:
        cos, sin = kwargs["position_embeddings"]
        return args, kwargs | {"position_embeddings": (cos * cos - sin * sin, 2 * sin * cos)}

    model.model.layers[1].self_attn.register_forward_pre_hook(twice, with_kwargs=True)
    with pytest.raises(ModelError, match=r"no rotation explains what layer 1 does"):
        check(model).rope()


def test_a_layer_that_cannot_be_tried_out_is_refused():
    model = tiny("llama")

    def fail(*_: Any) -> None:
        raise RuntimeError("not today")

    model.model.layers[2].self_attn.register_forward_pre_hook(fail)
    with pytest.raises(ModelError, match=r"layer 2 could not be tried out: not today"):
        check(model).rope()
