"""The numbers of a report: they add up, and they are those of live storage."""

import json
from dataclasses import replace

import pytest
import torch

from vestige import Budget, KVCache, attach, policies, prefill
from vestige.cache.layer import RaggedLayer
from vestige.cache.report import LayerReport, Report
from vestige.testing import left_padded, tiny

SMALL = {"sink": 2, "window": 4, "every": 8}


def read(name: str, policy, lengths: list[int], chunk: int = 16) -> KVCache:
    """Return a cache that has read random ids of the given lengths."""
    model = tiny(name)
    cache = KVCache(model, policy)
    ids, mask = left_padded(model, lengths)
    with attach(model), torch.no_grad():
        prefill(model, ids, cache, chunk=chunk, attention_mask=mask)
    return cache


def live_bytes(cache: KVCache) -> int:
    """Count the bytes of all tensors that the evictable layers hold, each once."""
    rings = [ring.data for layer in cache.evictable for ring in layer.rings.values()]
    tensors = [*rings, *(x for layer in cache.evictable for x in layer.columns.values())]
    return sum(storage.nbytes() for storage in {x.data_ptr(): x.untyped_storage() for x in tensors}.values())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("lengths", [[40], [40, 25]])
@pytest.mark.parametrize("budget", [Budget.tokens(12), Budget.fraction(0.5), None])
def test_numbers_add_up(name, lengths, budget):
    policy = policies.Full() if budget is None else policies.SnapKV(budget=budget, observed=8, share="layer", **SMALL)
    cache = read(name, policy, lengths)
    report = cache.report()
    rows_per_batch_row = sum(layer.kv_heads for layer in cache.evictable)
    assert report.seen == tuple(lengths)
    assert report.full == sum(lengths) * rows_per_batch_row
    assert report.held == cache.held == sum(sum(layer.rows) for layer in report.layers) <= report.full
    assert report.kept_fraction == report.held / report.full
    assert report.compression_ratio == 1 - report.kept_fraction
    assert [layer.layer_idx for layer in report.layers] == [layer.layer_idx for layer in cache.evictable]
    assert all(len(layer.rows) == len(lengths) * cache.evictable[0].kv_heads for layer in report.layers)
    if budget is None:
        assert report.budget_total is None and report.kept_fraction == 1.0
    else:
        assert report.held == report.budget_total < report.full


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_bytes_are_those_of_the_storages(name):
    cache = read(name, policies.SnapKV(budget=Budget.tokens(12), observed=8, **SMALL), [40, 25])
    report = cache.report()
    assert report.kv_bytes == sum(layer.nbytes for layer in cache.evictable) == live_bytes(cache)
    assert report.peak_kv_bytes >= report.kv_bytes
    assert report.memory_bytes == 0
    kv_heads, head_dim, layers = cache.evictable[0].kv_heads, 16, len(cache.evictable)
    assert report.full_kv_bytes == layers * 2 * kv_heads * 40 * 2 * head_dim * 4  # a DynamicCache stores pads too
    others = [layer for layer in cache.layers if not isinstance(layer, RaggedLayer)]
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in others)
    assert stored <= report.other_kv_bytes <= stored + 8 * len(others)  # a scalar for the window's length


def test_slack_at_rest_is_at_most_every_pairs_a_row():
    cache = read("llama", policies.KNorm(budget=Budget.tokens(12), **SMALL), [40])
    report = cache.report()
    rows, pair = 6, 2 * 16 * 4 + 4
    assert report.held * pair <= report.kv_bytes <= (report.held + rows * SMALL["every"]) * pair


def test_a_cache_without_eviction_weighs_what_it_holds():
    report = read("llama", policies.Full(), [40]).report()
    assert report.held == report.full == 240
    assert report.kv_bytes >= report.full_kv_bytes + 240 * 4  # positions


def test_an_empty_cache_reports_zeros():
    report = KVCache(tiny("llama"), policies.KNorm(budget=Budget.tokens(12), **SMALL)).report()
    assert (report.seen, report.held, report.full, report.kv_bytes, report.peak_kv_bytes) == ((), 0, 0, 0, 0)
    assert report.kept_fraction == 1.0 and report.budget_total is None and report.evict_s == 0.0
    assert "held 0 of 0 pairs" in str(report)


def example() -> Report:
    layers = (LayerReport(1, (3, 5), 10), LayerReport(12, (4, 4), 10))
    return Report(
        seen=(10,), held=16, full=40, kv_bytes=2112, peak_kv_bytes=1_234_567, full_kv_bytes=5120, other_kv_bytes=7,
        memory_bytes=0, evict_s=0.0125, budget_total=16, policy="KNorm", share="layer", layers=layers,
    )  # fmt: skip


def test_a_report_reads_as_text():
    assert str(example()).splitlines() == [
        "policy KNorm, share layer: seen 10, held 16 of 40 pairs (40.0%), 3 to 5 a row",
        "bytes 2,112 (peak 1,234,567; unevicted 5,120; other layers 7), 0.013 s evicting",
        "layer   1: min 3 max 5 mean 4.0",
        "layer  12: min 4 max 4 mean 4.0",
    ]


def test_a_report_goes_into_json_and_back():
    row = json.loads(json.dumps(example().as_dict()))
    assert row["kept_fraction"] == 0.4 and row["seen"] == [10]
    assert row["layers"][0] == {"layer_idx": 1, "rows": [3, 5], "seen": 10}
    assert set(row) == {*vars(example()), "kept_fraction"}


def test_a_report_is_a_snapshot():
    model = tiny("llama")
    cache = KVCache(model, policies.KNorm(budget=Budget.tokens(12), **SMALL))
    ids, _ = left_padded(model, [40])
    with attach(model), torch.no_grad():
        prefill(model, ids[:, :30], cache, chunk=16)
        before = cache.report()
        copy = replace(before)
        prefill(model, ids[:, 30:], cache, chunk=16)
    assert before == copy and cache.report() != before
