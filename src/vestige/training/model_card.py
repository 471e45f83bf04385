"""The card of trained weights: their data, options, command and validation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vestige.training import metrics
from vestige.training.config import LoopConfig
from vestige.training.data.documents import Document

CARD = "card.json"


def write_card(
    folder: Path,
    run: Path,
    *,
    what: str,
    model: str,
    documents: Sequence[Document],
    loop: LoopConfig,
    command: str,
    **more: Any,
) -> None:
    """Write ``card.json`` beside the weights.

    Args:
        folder: Folder of the weights.
        run: Folder of the run, whose metrics give the minutes and the last validation.
        what: Purpose of the weights and source of the method.
        model: Name of the model that they belong to.
        documents: Training and validation documents; the card has their names without folders.
        loop: Options of the loop.
        command: Command that repeats the training.
        more: Further JSON values.
    """
    records = metrics.read(run)
    validated: dict[str, Any] = next(
        (record["validation"] for record in reversed(records) if "validation" in record), {}
    )
    card = {
        "model": model,
        "what": what,
        "data": [Path(document.name).name for document in documents],
        "steps": loop.steps,
        "minutes": round(sum(record["seconds"] for record in records) / 60, 1),
        "seed": loop.seed,
        "command": command,
        "loop": loop.metadata(),
        **more,
        "validation": validated,
    }
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")
