"""Learned: replace the span's pairs with those that a trained adapter writes."""

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

    Positions and all other pairs stay bit for bit. Later pairs still carry what they read of the span; the new pairs
    steer later queries away from it. The cost is that of reading the span. Several spans run in one forward pass, each
    reading the new pairs of those before it.

    This steers the model. It is no deletion: traces of the span stay in later pairs (``recompute`` leaves none).

    Source: KVEraser, arXiv 2606.17034, its LoRA version. Completed by us: after an eviction only the pairs still held
    are replaced, or with ``whole`` all are written; memories are not read during the run.
    """

    fate: ClassVar[SlotOutcome] = SlotOutcome.REPLACED
    adapter: str | Adapter | None = None
    """A folder or hub id with an adapter in peft's format, or an `Adapter`; None takes the one for the model."""
    whole: bool = False
    """Write all pairs of the span, including evicted ones; the next eviction makes room for them."""
    forget: bool = False
    """Also release the spans' evicted pairs from a memory that is a sum; reads the text up to their end again."""

    def edit(self, request: EraseRequest) -> EditResult:
        """Run the spans, then write their pairs: nothing changes before all are computed."""
        at = torch.cat([torch.arange(span.start, span.end) for span in request.spans])
        with self.weights_for(request.model).applied(request.model):
            new = rerun(request.cache, at)
        release = MemoryRelease.of(request.cache, request.spans, request.model, wanted=self.forget)
        (write_whole if self.whole else write)(request.cache, at, new)
        release.carry_out()
        return EditResult(recomputed=len(at) + release.read, memory=release.outcome)

    def weights_for(self, model: PreTrainedModel) -> Adapter:
        """Return the adapter for a model.

        Raises:
            ModelError: The adapter is missing or does not fit.
        """
        return _WEIGHTS.refresh(self.adapter, model)


_WEIGHTS = WeightsCache("eraser", Adapter.load)
