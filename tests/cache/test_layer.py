"""Storage of one layer: handles, growth, dense views, rings."""

import pytest
import torch

from vestige import Budget, CacheError, KVCache, attach, policies, prefill
from vestige.cache.attention import KVHandle
from vestige.models.compat import cache_argument
from vestige.testing import random_ids, tiny


@pytest.fixture
def layer():
    model = tiny("llama")
    cache = KVCache(model, policies.Full())
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 2, 10), cache)
    layer = cache.evictable[1]
    layer.keep_alive = cache
    return layer


@pytest.fixture
def handle(layer):
    return KVHandle(layer, torch.Size((2, 2, 10, 16)), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    "use",
    [
        lambda h: h + 1,
        lambda h: 2 * h,
        lambda h: -h,
        lambda h: h @ torch.ones(16, 2),
        lambda h: torch.ones(2, 16) @ h,
        lambda h: h[..., :4],
        lambda h: h.transpose(1, 2),
        lambda h: h.repeat_interleave(2, dim=1),
        lambda h: torch.cat([h, h]),
        lambda h: torch.matmul(torch.ones(2, 16), h),
        lambda h: torch.nn.functional.normalize(h),
    ],
)
def test_any_use_of_a_handle_raises_and_names_the_remedy(handle, use):
    with pytest.raises(CacheError, match=r"vestige.check\(model\), or use a DynamicCache"):
        use(handle)


def test_a_handle_tells_shape_dtype_and_device(handle):
    assert (handle.shape, handle.dtype, handle.device.type) == ((2, 2, 10, 16), torch.float32, "cpu")


def test_a_layer_whose_cache_is_gone_says_so():
    layer = KVCache(tiny("llama"), policies.Full()).evictable[0]
    with pytest.raises(CacheError, match="is gone"):
        _ = layer.state


def test_the_dense_view_is_no_copy_and_a_step_within_the_slack_moves_nothing(layer):
    cache = layer.keep_alive
    keys = layer.columns["keys"]
    assert layer.view("keys").shape == (2, 2, 10, 16)
    assert layer.view("keys").untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
    model = cache.layout.model
    with torch.no_grad(), attach(model):
        for _ in range(cache.state.growth_slots - 1):
            model(random_ids(model, 2, 1), **cache_argument(cache))
        assert layer.columns["keys"] is keys
        model(random_ids(model, 2, 1), **cache_argument(cache))
        assert layer.columns["keys"] is not keys
    assert layer.get_seq_length() == 10 + cache.state.growth_slots


def test_mask_sizes_are_the_whole_while_dense_and_the_new_tokens_once_ragged():
    model = tiny("llama")
    cache = KVCache(model, policies.Random(budget=Budget.tokens(8), sink=1, window=2))
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 8), cache)
        assert cache.get_mask_sizes(3, 0) == (11, 0)
        prefill(model, random_ids(model, 1, 8), cache)
    assert cache.get_mask_sizes(3, 0) == (3, 16)
    assert all(layer.ragged for layer in cache.evictable), "all layers turn ragged in the same settle"
    assert cache.get_seq_length() == 16 and cache.get_max_length() == -1


def test_the_ring_holds_the_latest_queries_in_order():
    model = tiny("llama")
    ids = random_ids(model, 1, 23)
    seen = []
    attention = model.model.layers[1].self_attn
    with torch.no_grad(), attach(model):
        cache = KVCache(model, policies.SnapKV(budget=Budget.tokens(100), observed=5))
        from vestige.cache.layer import RaggedLayer

        record = RaggedLayer._observe_queries

        def spy(self, query, state, step, scale):
            if self.layer_idx == attention.layer_idx:
                seen.append(query)
            return record(self, query, state, step, scale)

        RaggedLayer._observe_queries = spy
        try:
            prefill(model, ids[:, :3], cache)
            prefill(model, ids[:, 3:16], cache, chunk=4)
            for i in range(16, 23):
                model(ids[:, i : i + 1], **cache_argument(cache))
        finally:
            RaggedLayer._observe_queries = record
    (latest,) = cache.evictable[1].rings["queries"].latest(cache.seen)
    assert torch.equal(latest, torch.cat(seen, 2)[0, :, -5:])


def test_offloaded_and_compiled_forms_are_not_offered():
    layer = KVCache(model := tiny("llama"), policies.Full()).evictable[0]
    assert model is not None
    assert layer.is_croppable and not layer.is_compileable and not layer.is_sliding
