"""The learned eraser's runtime: adapters by hooks, pairs replaced in place, all of it without trained weights."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.erasers.test_erase import columns_of, evicting, logits_of, read, trained
from vestige import ModelError, Span, attach, erase, policies
from vestige.cache.overlay import rerun
from vestige.erasers.learned import Learned
from vestige.models.compat import cache_argument
from vestige.nn.lora import Adapter
from vestige.testing import left_padded, random_ids, tiny

SPAN = Span(10, 16)


def saved(model, folder, **options) -> str:
    trained(model, **options).save(folder, dtype=torch.float32)
    return str(folder)


def test_the_untrained_eraser_writes_what_was_there(tmp_path):
    model = tiny("llama")
    ids = random_ids(model, 2, 40)
    Adapter.initialize(model).save(tmp_path / "new")
    cache, before = read(model, ids), columns_of(read(model, ids))
    report = erase(cache, SPAN, Learned(adapter=str(tmp_path / "new")), model=model, input_ids=ids).report
    assert report.slots_replaced == 2 * 6 * len(SPAN) and report.tokens_recomputed == len(SPAN)
    for was, now in zip(before, columns_of(cache), strict=True):
        assert all(torch.allclose(was[name], now[name], atol=1e-6) for name in was)


def test_only_pairs_of_the_span_change_and_all_of_them_do(tmp_path):
    model = tiny("llama")
    ids, mask = left_padded(model, [40, 30], seed=1)
    cache, before = read(model, ids, mask=mask), columns_of(read(model, ids, mask=mask))
    done = erase(cache, SPAN, Learned(adapter=saved(model, tmp_path / "a")), model=model, input_ids=ids)
    assert torch.equal(done.input_ids, ids) and cache.state.erased == (SPAN,) and not done.report.exact
    for was, now in zip(before, columns_of(cache), strict=True):
        inside = (was["positions"] >= 10) & (was["positions"] < 16)
        assert torch.equal(was["positions"], now["positions"])
        assert all(torch.equal(was[name][~inside], now[name][~inside]) for name in ("keys", "values"))
        assert (was["values"][inside] != now["values"][inside]).any(-1).all()


def test_the_new_pairs_are_those_of_a_plain_forward_with_the_adapter_behind_the_prefix(tmp_path):
    from transformers import DynamicCache

    model = tiny("llama")
    ids, adapter = random_ids(model, 1, 40), trained(model)
    cache = read(model, ids)
    erase(cache, SPAN, Learned(adapter=saved(model, tmp_path / "a")), model=model, input_ids=ids)
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :10], **cache_argument(plain))
        with adapter.applied(model):
            model(ids[:, 10:16], **cache_argument(plain))
    for layer, expected in zip(cache.evictable, plain.layers, strict=True):
        torch.testing.assert_close(layer.view("keys")[:, :, 10:16], expected.keys[:, :, 10:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.view("values")[:, :, 10:16], expected.values[:, :, 10:], atol=1e-5, rtol=1e-4)


def test_several_spans_in_one_call_are_as_one_after_the_other(tmp_path):
    model = tiny("llama")
    ids, eraser = random_ids(model, 1, 40), Learned(adapter=saved(model, tmp_path / "a"))
    one, other = read(model, ids), read(model, ids)
    erase(one, [Span(24, 29), SPAN], eraser, model=model, input_ids=ids)
    for span in (SPAN, Span(24, 29)):
        erase(other, span, eraser, model=model, input_ids=ids)
    assert one.state.erased == other.state.erased == (SPAN, Span(24, 29))
    for a, b in zip(columns_of(one), columns_of(other), strict=True):
        assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


@pytest.mark.parametrize("policy", ["keydiff", "h2o", "laprox", "compactor"])
def test_after_an_eviction_what_is_held_is_replaced_or_the_whole_span_written(policy, tmp_path):
    model, folder = tiny("llama"), tmp_path / "a"
    ids, mask = left_padded(model, [50, 44], seed=3)
    adapter = saved(model, folder)
    held = {}
    for whole in (False, True):
        cache = read(model, ids, evicting(24, policy), mask=mask)
        before = cache.held
        report = erase(cache, Span(2, 30), Learned(adapter=adapter, whole=whole), model=model, input_ids=ids).report
        held[whole] = cache.held - before
        assert 0 < report.slots_replaced < 2 * 6 * 28
        if whole:
            assert cache.held - before == 2 * 6 * 28 - report.slots_replaced
            for layer in cache.evictable:
                for row in range(layer.rows):
                    assert set(range(2, 30)) <= set(layer.positions(row).tolist())
                    assert layer.positions(row).tolist() == sorted(layer.positions(row).tolist())
            cache.settle()
            assert cache.held == cache.report().budget_total
    assert held[False] == 0


def test_the_base_model_is_bit_for_bit_what_it_was(tmp_path):
    model = tiny("llama")
    ids, before = random_ids(model, 1, 40), {name: x.clone() for name, x in model.state_dict().items()}
    expected = model(ids).logits
    erase(read(model, ids), SPAN, Learned(adapter=saved(model, tmp_path / "a")), model=model, input_ids=ids)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert torch.equal(model(ids).logits, expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_reach_the_adapter_alone_and_all_of_it():
    model = tiny("llama").requires_grad_(False)
    ids, adapter = random_ids(model, 1, 40), trained(model)
    cache = read(model, ids)
    with attach(model), adapter.applied(model):
        new = rerun(cache, torch.arange(10, 16))
    sum((pairs.keys.square().sum() + pairs.values.square().sum()) for pairs in new.values()).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in adapter.parameters())
    assert all(weight.grad is None for weight in model.parameters())


# Adapters as files.


def test_an_adapter_comes_back_from_its_files(tmp_path):
    model = tiny("llama")
    adapter = trained(model)
    adapter.save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a", model)
    assert sorted(again.config.modules) == sorted(adapter.config.modules) and again.config.rank == 4
    ids = random_ids(model, 1, 9)
    with torch.no_grad(), adapter.applied(model):
        expected = model(ids).logits
    with torch.no_grad(), again.applied(model):
        torch.testing.assert_close(model(ids).logits, expected, atol=5e-3, rtol=5e-3)


def test_the_last_layer_is_adapted_in_its_keys_and_values_alone():
    names = [name for name in Adapter.initialize(tiny("llama")).config.modules if ".layers.2." in f".{name}."]
    assert sorted(name.rpartition(".")[2] for name in names) == ["k_proj", "v_proj"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_peft_reads_our_files_and_computes_the_same(tmp_path):
    from peft import PeftModel

    model = tiny("llama")
    adapter = trained(model)
    adapter.save(tmp_path / "a", dtype=torch.float32)
    ids = random_ids(model, 1, 9)
    with torch.no_grad(), adapter.applied(model):
        expected = model(ids).logits
    theirs = PeftModel.from_pretrained(model, str(tmp_path / "a"))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-5, rtol=1e-4)


def damaged(folder, case: str) -> None:
    path = folder / "adapter_config.json"
    if case == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    elif case == "weights cut":
        (folder / "adapter_model.safetensors").write_bytes(b"\x10\x00")
    elif case == "no json":
        path.write_text("{")
    else:
        weights = load_file(folder / "adapter_model.safetensors")
        save_file(weights, folder / "adapter_model.safetensors", metadata={"base_model_fingerprint": "x" * 32})


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no weights", "no adapter_model.safetensors"),
        ("weights cut", "is damaged"),
        ("no json", "is damaged"),
        ("other base", "made for another model"),
    ],
)
def test_files_that_do_not_serve_are_refused(case, said, tmp_path):
    model = tiny("llama")
    trained(model).save(tmp_path / "a")
    damaged(tmp_path / "a", case)
    with pytest.raises(ModelError, match=said):
        Adapter.load(tmp_path / "a", model)


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    trained(tiny("llama")).save(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(path), path)  # without the fingerprint of the model
    with pytest.raises(ModelError, match="features of .*the model has"):
        Adapter.load(tmp_path / "a", tiny("llama", hidden_size=96, head_dim=24))


def test_an_adapter_at_hand_of_another_model_is_refused():
    model, ids = tiny("llama"), random_ids(tiny("llama"), 1, 40)
    cache = read(model, ids)
    with pytest.raises(ModelError, match="made for another model"):
        erase(cache, SPAN, Learned(adapter=trained(tiny("llama", seed=1))), model=model, input_ids=ids)


def test_a_model_without_a_shipped_eraser_is_told_how_to_get_one():
    model = tiny("llama")
    ids = random_ids(model, 1, 40)
    cache = read(model, ids, policies.Full())
    with pytest.raises(ModelError, match="vestige train eraser"):
        erase(cache, SPAN, Learned(), model=model, input_ids=ids)
    assert torch.equal(logits_of(model, cache, ids[:, :3]), logits_of(model, read(model, ids), ids[:, :3]))
