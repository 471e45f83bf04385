"""The provenance of results: the revision of the code, versions, and device."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from vestige.utils.version import __version__


def collect_provenance(model: PreTrainedModel) -> dict[str, Any]:
    """Return the columns of every row on its origin: ``revision, versions, device, dtype``."""
    return {
        "revision": find_revision(),
        "versions": {
            "vestige": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": _describe_device(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def find_revision() -> str | None:
    """Return the commit of the checkout that this code runs from, ``-dirty`` if the code was changed; None outside."""
    try:
        _git("ls-files", "--error-unmatch", __file__)  # fails if installed below somebody else's checkout
        changed = _git("status", "--porcelain", "--", str(Path(__file__).parents[2]))  # results may differ
        return _git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {_find_cpu_model()}, {torch.get_num_threads()} threads"


def _find_cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
