"""Small trained weights that belong to one model: where they lie, whether shipped, in a folder, or on the hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from vestige.errors import ModelError
from vestige.models import check

SHIPPED = Path(__file__).parent / "learn" / "weights"
"""What comes with the package: a folder for each kind and model, ``<kind>-<fingerprint of the model>``."""
_FILES = ("*.safetensors", "*.json")


def folder_of(kind: str, name: str | None, model: PreTrainedModel) -> Path:
    """Return the folder with weights of a kind.

    Args:
        kind: ``"eraser"``, ``"retention"``, ...
        name: A folder, else a hub id, of which only safetensors and JSON are fetched; None takes what is shipped.
        model: What they are for.

    Raises:
        ModelError: Nothing of that kind is shipped for the model, or the name is no folder and cannot be fetched.
    """
    if name is None:
        return _shipped(kind, model)
    if (folder := Path(name)).is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"no such folder: {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # a dozen types come out of the hub's client and what it stands on
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{name} is no folder and cannot be fetched from the hub: {reason}") from None


def _shipped(kind: str, model: PreTrainedModel) -> Path:
    home = SHIPPED / f"{kind}-{check(model).fingerprint()}"
    if not home.is_dir():
        name = model.config.name_or_path or type(model).__name__
        raise ModelError(
            f"no {kind} weights are shipped for {name}; train some with `vestige train {kind}` and name their folder"
        )
    return home
