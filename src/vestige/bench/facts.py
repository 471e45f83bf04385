"""Where a result comes from: the revision of the code, versions, device."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import vestige


def provenance(model: PreTrainedModel) -> dict[str, Any]:
    """Return what every row says of its origin: ``revision, versions, device, dtype``."""
    return {
        "revision": revision(),
        "versions": {
            "vestige": vestige.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": _device(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def revision() -> str | None:
    """Return the commit of the checkout that this code runs from, ``-dirty`` if it was changed; None outside of one."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        known = subprocess.run(["git", "-C", str(here), "ls-files", "--error-unmatch", __file__], capture_output=True)
        if known.returncode:  # installed below somebody else's checkout
            return None
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {_cpu_model()}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
