"""Leave the cache as it is and tell the model, behind everything, that the span was wrong."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from vestige.cache.prefill import prefill
from vestige.erasers.base import EditResult, Eraser, EraseRequest, SlotOutcome
from vestige.errors import InputError

TEXT = (
    '\n\nCorrection: the passage "{span}" above was a mistake. Ignore it and answer as if it had never been there.\n\n'
)


@dataclass(frozen=True, kw_only=True)
class Erratum(Eraser):
    """Append a correction that quotes the span: no pair is touched, and what was erased is read once more.

    Source: the instruction-only baseline of KVEraser, arXiv 2606.17034, here put behind the text, as an erratum (arXiv
    2606.17107), so that one edit serves all later questions.
    """

    fate: ClassVar[SlotOutcome] = SlotOutcome.LEFT
    ids: tuple[int, ...] | None = None
    """Token ids to append. None makes them of ``TEXT`` with the tokenizer that lies beside the model."""

    def edit(self, scene: EraseRequest) -> EditResult:
        """Read the correction into a fork, which takes the place of the cache; it stays whole until the next settle."""
        rows = [self._ids(scene, b) for b in range(len(scene.cache.seen))]
        if len(set(map(len, rows))) > 1:
            raise InputError("corrections of batch rows have several lengths; give ids of one length")
        ids = torch.tensor(rows, device=scene.model.device)
        twin = scene.cache.fork()
        prefill(scene.model, ids, twin, settle=False)
        scene.cache.replace_with(twin)
        return EditResult(recomputed=ids.shape[1], added=ids.shape[1], memory=scene.memory)

    def _ids(self, scene: EraseRequest, batch: int) -> list[int]:
        if self.ids is not None:
            return list(self.ids)
        tokenizer = _tokenizer(scene.model)
        row = scene.cache.ids[batch][scene.cache.real[batch]]
        said = [tokenizer.decode(row[span.start : span.end].tolist()).strip() for span in scene.spans]
        text = TEXT.format(span='", "'.join(said))
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    source = model.config.name_or_path
    if not source or not Path(source).exists():
        raise InputError("erratum needs the ids of a correction: no tokenizer lies beside this model; give ids=(...)")
    return AutoTokenizer.from_pretrained(source, local_files_only=True)
