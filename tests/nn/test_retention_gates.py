"""Retention gates: shape, float32, whose they are, files that serve and files that do not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, logsigmoid, silu

from tests.conftest import random_gates
from vestige import InputError, ModelError
from vestige.nn import pretrained
from vestige.nn.retention_gates import Gates, GatesConfig
from vestige.testing import tiny

WEIGHTS, CONFIG = "gates.safetensors", "gates.json"
MODEL = tiny("llama")


def hidden(model=MODEL, tokens: int = 5) -> torch.Tensor:
    return torch.randn(2, tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False])
def test_log_beta_is_the_formula(tied):
    gates, x = random_gates(MODEL, tied=tied), hidden()
    for place, layer_idx in enumerate(gates.config.layers):
        first, _, second, _ = gates.bodies[place]
        head = gates.heads[0 if tied else place]
        inner = silu(linear(silu(linear(x, first.weight, first.bias)), second.weight, second.bias))
        expected = logsigmoid(linear(inner, head.weight, head.bias)).transpose(1, 2)
        torch.testing.assert_close(gates(layer_idx, x), expected)


def test_tied_gates_have_one_head_and_the_others_one_a_layer():
    layers = MODEL.config.num_hidden_layers
    assert len(random_gates(MODEL).heads) == 1 and len(random_gates(MODEL, tied=False).heads) == layers


def test_fresh_gates_keep_everything_about_alike():
    torch.manual_seed(0)
    found = Gates.initialize(MODEL, width=16, bias=6.0)(0, hidden())
    torch.testing.assert_close(
        found, torch.full_like(found, -torch.log1p(torch.tensor(-6.0).exp()).item()), rtol=0.2, atol=0
    )


def test_the_body_runs_in_the_models_dtype_and_log_beta_is_float32():
    model = tiny("llama", dtype=torch.bfloat16)
    gates = random_gates(model)
    ready = gates.for_inference(model.dtype)
    assert ready.bodies[0][0].weight.dtype == torch.bfloat16 and ready.heads[0].weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in ready.parameters())
    found = ready(0, hidden(model).bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gates(0, hidden(model)), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "mistral"])
def test_gates_fit_the_evictable_layers_of_any_model(name):
    model = tiny(name)
    gates = random_gates(model)
    for layer_idx, rows in zip(gates.config.layers, gates.config.kv_heads, strict=True):
        assert gates(layer_idx, hidden(model)).shape == (2, rows, 5)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_gates_come_back_rounded_to_half(tied, tmp_path):
    gates = random_gates(MODEL, tied=tied)
    gates.save(tmp_path / "g")
    again = Gates.load(tmp_path / "g", MODEL)
    assert again.config == gates.config
    for name, x in gates.state_dict().items():
        assert torch.equal(again.state_dict()[name], x.half().float())


def test_gates_of_another_model_are_refused(tmp_path):
    random_gates(MODEL).save(tmp_path / "g")
    with pytest.raises(ModelError, match="made for another model"):
        Gates.load(tmp_path / "g", tiny("llama", seed=1))


def broken(folder, case: str) -> None:
    if case == "no weights":
        (folder / WEIGHTS).unlink()
    elif case == "cut":
        (folder / WEIGHTS).write_bytes(b"\x10\x00")
    elif case == "no json":
        (folder / CONFIG).write_text("{")
    elif case == "not an object":
        (folder / CONFIG).write_text("[1]")
    elif case == "another field":
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | {"height": 3}))
    elif case == "another width":
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | {"width": 9}))
    else:
        save_file(dict(list(load_file(folder / WEIGHTS).items())[1:]), folder / WEIGHTS)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no weights", f"no {WEIGHTS}"),
        ("cut", "cannot be read"),
        ("no json", "cannot be read"),
        ("not an object", "cannot be read"),
        ("another field", "cannot be read.*height"),
        ("another width", "cannot be read.*size mismatch"),
        ("a tensor less", "cannot be read.*Missing key"),
    ],
)
def test_files_that_do_not_serve_are_refused(case, said, tmp_path):
    random_gates(MODEL).save(tmp_path / "g")
    broken(tmp_path / "g", case)
    with pytest.raises(ModelError, match=said):
        Gates.load(tmp_path / "g", MODEL)


@pytest.mark.parametrize(
    "wrong", [{"layers": ()}, {"kv_heads": (1,)}, {"width": 0}, {"depth": 0}, {"hidden": 0}, {"kv_heads": (1, 0)}]
)
def test_shapes_that_make_no_gates_are_refused(wrong):
    with pytest.raises(InputError, match="gates need|at least 1"):
        GatesConfig(**{"layers": (0, 1), "kv_heads": (2, 2), "hidden": 8} | wrong)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (None, "no retention weights are shipped for .*vestige train retention"),
        ("nowhere", "no such folder: nowhere"),
        ("./owner/set", "no such folder"),
        ("nobody/nothing", "nobody/nothing is no folder and cannot be fetched from the hub"),
    ],
)
def test_weights_that_are_nowhere_are_one_line(name, said, monkeypatch):
    def offline(*_: object, **__: object) -> str:
        raise OSError("offline\nfor good")

    monkeypatch.setattr(pretrained, "snapshot_download", offline)
    with pytest.raises(ModelError, match=said) as raised:
        pretrained.folder_of("retention", name, MODEL)
    assert "\n" not in str(raised.value)


def test_weights_on_the_hub_are_fetched_without_code(monkeypatch, tmp_path):
    random_gates(MODEL).save(tmp_path)
    asked = {}

    def fetched(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(pretrained, "snapshot_download", fetched)
    Gates.load(pretrained.folder_of("retention", "owner/gates", MODEL), MODEL)
    assert asked == {"name": "owner/gates", "allow_patterns": ["*.safetensors", "*.json"]}
