"""Erratum: append a correction to the cache."""

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

    Source: the instruction-only baseline of KVEraser, arXiv 2606.17034, here appended to the text, as an erratum
    (arXiv 2606.17107), so that one edit serves all later questions.
    """

    fate: ClassVar[SlotOutcome] = SlotOutcome.LEFT
    ids: tuple[int, ...] | None = None
    """Token ids to append. None tokenizes ``TEXT`` with the tokenizer in the model's folder."""

    def edit(self, request: EraseRequest) -> EditResult:
        """Read the correction into a fork, which replaces the cache; nothing is evicted before the next `settle`."""
        rows = [self._make_ids(request, b) for b in range(len(request.cache.seen))]
        if len(set(map(len, rows))) > 1:
            raise InputError("corrections of batch rows have several lengths; give ids of one length")
        ids = torch.tensor(rows, device=request.model.device)
        copy = request.cache.fork()
        prefill(request.model, ids, copy, settle=False)
        request.cache.replace_with(copy)
        return EditResult(recomputed=ids.shape[1], added=ids.shape[1], memory=request.memory)

    def _make_ids(self, request: EraseRequest, batch: int) -> list[int]:
        if self.ids is not None:
            return list(self.ids)
        tokenizer = _load_tokenizer(request.model)
        row = request.cache.ids[batch][request.cache.real[batch]]
        quotes = [tokenizer.decode(row[span.start : span.end].tolist()).strip() for span in request.spans]
        text = TEXT.format(span='", "'.join(quotes))
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _load_tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    source = model.config.name_or_path
    if not source or not Path(source).exists():
        raise InputError("erratum needs the ids of a correction: no tokenizer lies beside this model; give ids=(...)")
    return AutoTokenizer.from_pretrained(source, local_files_only=True)
