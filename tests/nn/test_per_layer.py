"""Modules with a part for each layer: made for a model, saved under their names, and loaded for that model alone."""

import json
from typing import Any

import pytest
import torch

from vestige import ModelError
from vestige.nn.indexer import Indexer
from vestige.nn.latent_memory import WIDTHS, Latent
from vestige.nn.per_layer import PerLayerModule
from vestige.nn.retention_gates import Gates
from vestige.testing import tiny

MODEL = tiny("llama")
KINDS: list[tuple[type[PerLayerModule[Any]], str, str, dict[str, Any]]] = [
    (Gates, "gates", "retention gates", {"width": 8}),
    (Indexer, "indexer", "indexer", {"dim": 4, "heads": 2}),
    (Latent, "linear", "linear memory", {"kind": "linear", "width": 8}),
    (Latent, "slots", "slots memory", {"kind": "slots", "decays": True}),
]


@pytest.fixture(params=KINDS, ids=[name for _, name, _, _ in KINDS])
def case(request):
    return request.param


def test_a_module_comes_back_with_its_config_and_frozen_but_for_gates(case, tmp_path):
    cls, name, _, options = case
    made = cls.initialize(MODEL, **options)
    made.save(tmp_path, dtype=torch.float32)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.json", f"{name}.safetensors"}
    found = cls.load(tmp_path, MODEL, options.get("kind", ""))
    assert found.config == made.config and json.loads((tmp_path / f"{name}.json").read_text())["layers"] == [0, 1, 2]
    assert all(torch.equal(x, found.state_dict()[key]) for key, x in made.state_dict().items())
    assert {weight.requires_grad for weight in found.parameters()} == {cls is Gates}


def test_another_model_and_a_folder_without_files_are_refused_by_title(case, tmp_path):
    cls, name, title, options = case
    with pytest.raises(ModelError, match=f"has no {title}: no {name}.json"):
        cls.load(tmp_path, MODEL, options.get("kind", ""))
    made = cls.initialize(MODEL, **options)
    with pytest.raises(ModelError, match=f"^{title} made for another model, or for other weights$"):
        made.require_fit(tiny("llama", seed=1))


def test_a_latent_without_a_width_has_that_of_its_kind():
    assert {kind: Latent.initialize(MODEL, kind=kind, width=None).config.width for kind in WIDTHS} == dict(WIDTHS)
