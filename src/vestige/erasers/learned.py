"""Replace the span's pairs by those that a trained adapter writes, which steer later queries past it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from vestige.cache.overlay import rerun, write, write_whole
from vestige.erasers.base import EditResult, Eraser, EraseRequest, SlotOutcome
from vestige.erasers.forget import MemoryRelease
from vestige.nn.lora import Adapter
from vestige.nn.pretrained import WeightsCache


@dataclass(frozen=True, kw_only=True)
class Learned(Eraser):
    """Run the span's tokens through the model with an adapter on, behind what stands before them; keep what they write.

    Positions, and every other pair, stay bit for bit; what follows still carries what it read of the span, and the new
    pairs steer later queries past it. It costs as much as reading the span. Several spans are run in one forward, each
    reading what the ones before it wrote.

    This steers the model. It is no deletion: traces of the span stay in what follows (``recompute`` leaves none).

    Source: KVEraser, arXiv 2606.17034, its LoRA version. Completed by us: after an eviction the pairs that are still
    held are replaced, or with ``whole`` all are written; memories are not read while the span is run.
    """

    fate: ClassVar[SlotOutcome] = SlotOutcome.REPLACED
    adapter: str | Adapter | None = None
    """A folder or hub id with an adapter in peft's format, or one at hand; None takes what is shipped for the model."""
    whole: bool = False
    """Write all pairs of the span, also those that were evicted; the next settle makes room for them."""
    forget: bool = False
    """Also take the spans' evicted pairs out of a memory that is a sum, by reading up to their end once more."""

    def edit(self, scene: EraseRequest) -> EditResult:
        """Run the spans, then write: nothing is changed before all pairs are there."""
        at = torch.cat([torch.arange(span.start, span.end) for span in scene.spans])
        with self.weights_for(scene.model).applied(scene.model):
            new = rerun(scene.cache, at)
        release = MemoryRelease.of(scene.cache, scene.spans, scene.model, wanted=self.forget)
        (write_whole if self.whole else write)(scene.cache, at, new)
        release.carry_out()
        return EditResult(recomputed=len(at) + release.read, memory=release.outcome)

    def weights_for(self, model: PreTrainedModel) -> Adapter:
        """Return the adapter for a model.

        Raises:
            ModelError: There is none, or it does not fit.
        """
        return _SHELF.refresh(self.adapter, model)


_SHELF = WeightsCache("eraser", Adapter.load)
