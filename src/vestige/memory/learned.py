"""Base class of memories with trained weights: loading them, and the decay of pairs."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from vestige.errors import PolicyError
from vestige.memory.base import EvictedPairs, Memory, State
from vestige.memory.storage import Dtype, check_dtype
from vestige.nn.latent_memory import KINDS, Kind, Latent, LayerLatent, kind_of
from vestige.nn.pretrained import WeightsCache

INTERVAL = 128
"""Tokens per application of a layer's decay."""


@dataclass(frozen=True, kw_only=True)
class LearnedMemory(Memory):
    """A memory that is a sum over pairs, with trained weights."""

    kind: ClassVar[Kind]
    latent: str | Latent | None = None
    """A folder, a hub id, or a `Latent`; None takes the weights shipped for the model."""
    dtype: Dtype = "float16"
    """Dtype of what is stored for keys and values; all else is float32."""

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if isinstance(self.latent, Latent) and self.latent.config.kind != self.kind:
            raise PolicyError(f"memory {self.kind!r} was given the weights of a {self.latent.config.kind} memory")

    def bind(self, model: PreTrainedModel) -> "LearnedMemory":
        """Return this memory with its weights loaded; raise a ModelError if none fit the model or they are damaged."""
        return replace(self, latent=_WEIGHTS[self.kind].refresh(self.latent, model))

    def weights_for(self, model: PreTrainedModel) -> Latent:
        """Return the weights for a model, as :meth:`bind` loads them."""
        return self.bind(model).weights

    @property
    def releases(self) -> bool:
        """Whether pairs can be removed: only without decay."""
        return not self.weights.config.decays

    @property
    def weights(self) -> Latent:
        """The loaded weights."""
        assert isinstance(self.latent, Latent), "the cache asks for the memory that is made for its model"
        return self.latent

    def absorb(self, state: State, evicted: EvictedPairs) -> State:
        """Return the state of rows that absorbed these pairs too."""
        return self._update(state, evicted, 1.0)

    def release(self, state: State, evicted: EvictedPairs) -> State:
        """Return the state of rows without these pairs, which they absorbed.

        Raises:
            PolicyError: The memory decays, so the remaining weight of its pairs is unknown.
        """
        if not self.releases:
            raise PolicyError("this memory's pairs fade, so they cannot be taken out again; use one without decay")
        return self._update(state, evicted, -1.0)

    @abstractmethod
    def _update(self, state: State, evicted: EvictedPairs, sign: float) -> State:
        """Return the state with pairs added, or removed if ``sign`` is -1."""

    def _empty_clock(self, rows: int, device: torch.device | str) -> State:
        """Return the entries of an empty state that count pairs and track decay."""
        names = ("count", "latest") if self.weights.config.decays else ("count",)
        return {name: torch.zeros(rows, device=device) for name in names}

    def _advance(
        self, layer: LayerLatent, state: State, evicted: EvictedPairs, sign: float
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows longest 1"], dict[str, Tensor]]:
        """Return the factors of the old state and of each new pair (0 after a row's last), and the new clock."""
        clock = {"count": (state["count"] + sign * evicted.counts).clamp_min(0.0)}
        there = evicted.valid.float()
        log_kept = layer.log_kept()
        if log_kept is None:
            return torch.ones_like(state["count"]), there[..., None], clock
        positions = evicted.positions.float()
        latest = torch.maximum(state["latest"], positions.amax(1))
        ages = torch.where(evicted.valid, latest[:, None] - positions, 0.0)
        lives, before = (torch.exp(age / INTERVAL * log_kept) for age in (ages, latest - state["latest"]))
        return before, (there * lives)[..., None], clock | {"latest": latest}


_WEIGHTS = {kind: WeightsCache("indexmem", partial(Latent.load, kind=kind_of(kind))) for kind in KINDS}
