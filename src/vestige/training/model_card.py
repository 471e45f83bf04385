"""The card of trained weights: on what, for how long, by which command, and how well."""

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
        folder: Where the weights are.
        run: Where the run kept its metrics: minutes and the last validation are taken from there.
        what: They do, and whose method that is.
        model: They belong to.
        documents: They were trained or validated on; their names go into the card, without folders.
        loop: How long and how fast.
        command: That makes them again.
        more: Whatever else is worth knowing, as JSON values.
    """
    records = metrics.read(run)
    validated: dict[str, Any] = next((one["validation"] for one in reversed(records) if "validation" in one), {})
    card = {
        "model": model,
        "what": what,
        "data": [Path(one.name).name for one in documents],
        "steps": loop.steps,
        "minutes": round(sum(one["seconds"] for one in records) / 60, 1),
        "seed": loop.seed,
        "command": command,
        "loop": loop.metadata(),
        **more,
        "validation": validated,
    }
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")
