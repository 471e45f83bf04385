"""IndexMem's latent memory: a sum of outer products of projected keys and their values for each row."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from vestige.errors import PolicyError
from vestige.kernels.partial import Added, Partial
from vestige.latent import Latent, LayerLatent
from vestige.memory.storage import Dtype, check_dtype, restored, stored
from vestige.remains import Asked, Evicted, Memory, State, log_count
from vestige.weights import Shelf

INTERVAL = 128
"""Tokens in which a pair fades by its layer's decay once."""
_LEAST = 1e-6  # of what is divided by


@dataclass(frozen=True, kw_only=True)
class Linear(Memory):
    """Remember the evicted as ``M = sum phi(k) v^T`` and ``b = sum phi(k)^2``; read ``phi(q)^T M / (phi(q)^2)^T b``.

    ``phi`` is a trained linear projection, one for each layer. What is read is added to attention over what is kept,
    times a trained gate between 0 and 1; it takes no part in the softmax, so a gate of 0 changes nothing. Weights may
    be made to merge instead: what is read then counts by ``log n + a (q . mean_k) + c``, an estimate of what the
    evicted pairs would weigh in the softmax, with a and c trained.

    Source: IndexMem, arXiv 2605.25475, after its authors' code; ours are the merged form, after the identity that
    attention over two parts obeys, and decay by tokens. Weights: ``vestige train indexmem``.

    Weighs, at head size 64 and width 32, as much as 16 pairs in bfloat16 (4,232 bytes a row; 32 pairs with
    ``dtype="float32"``).
    """

    latent: str | Latent | None = None
    """A folder, a hub id, or weights at hand; None takes those that are shipped for the model."""
    dtype: Dtype = "float16"
    """Of the stored sum of outer products; all else is float32."""

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    def made_for(self, model: PreTrainedModel) -> "Linear":
        """Return this memory with its weights at hand.

        Raises:
            ModelError: There are none, they are damaged, or another model's.
        """
        if isinstance(self.latent, Latent):
            self.latent.require_fit(model)
            return self
        return replace(self, latent=_SHELF.get(self.latent, model))

    @property
    def releases(self) -> bool:
        """Whether pairs can be taken out again: nothing fades."""
        return not self._weights.config.decays

    def empty(self, rows: int, head_dim: int, value_dim: int, device: torch.device | str) -> State:
        """Return the state of rows that absorbed nothing."""
        config = self._weights.config
        state = stored("matrix", torch.zeros(rows, config.width, value_dim, device=device), self.dtype)
        state |= {"mass": torch.zeros(rows, config.width, device=device), "count": torch.zeros(rows, device=device)}
        if config.decays:
            state["latest"] = torch.zeros(rows, device=device)
        if config.fusion == "merged":
            state["keys"] = torch.zeros(rows, head_dim, device=device)
        return state

    def absorb(self, state: State, evicted: Evicted) -> State:
        """Return the state of rows that absorbed these pairs too."""
        return self._changed(state, evicted, 1.0)

    def release(self, state: State, evicted: Evicted) -> State:
        """Return the state of rows without these pairs, which they absorbed.

        Raises:
            PolicyError: Pairs fade, so what is left of them is not known.
        """
        if not self.releases:
            raise PolicyError("this memory's pairs fade, so they cannot be taken out again; use one without decay")
        return self._changed(state, evicted, -1.0)

    def recall(self, state: State, asked: Asked) -> Partial | Added:
        """Return what is added to attention, or what it is merged with."""
        layer = self._weights.at(asked.layer_idx)
        projected = layer.project(asked.queries)
        weighed = projected.square() @ state["mass"][..., None]
        found = projected @ restored(state, "matrix") / (weighed + _LEAST)
        if layer.mass is None:
            return Added(found * layer.open(asked.queries))
        factor, offset = layer.mass.unbind()
        mean = state["keys"] / state["count"].clamp_min(1)[:, None]
        logit = asked.scale.capped((asked.queries * asked.scale.scaling @ mean[..., None])[..., 0])
        weighs = log_count(state["count"])[:, None]
        return Partial(found, torch.where(state["count"][:, None] > 0, weighs + factor * logit + offset, weighs))

    @property
    def _weights(self) -> Latent:
        assert isinstance(self.latent, Latent), "the cache asks for the memory that is made for its model"
        return self.latent

    def _changed(self, state: State, evicted: Evicted, sign: float) -> State:
        layer = self._weights.at(evicted.layer_idx)
        projected = layer.project(evicted.keys)  # zeros behind a row's pairs
        before, lives, new = self._faded(layer, state, evicted)
        weighed = sign * projected * lives
        new["count"] = (state["count"] + sign * evicted.counts).clamp_min(0.0)
        left = (new["count"] > 0)[:, None]  # where all were released, what rounding leaves is no memory
        new["mass"] = left * (before[:, None] * state["mass"] + (weighed * projected).sum(1)).clamp_min(0.0)
        matrix = before[:, None, None] * restored(state, "matrix") + weighed.mT @ evicted.values
        if "keys" in state:
            new["keys"] = left * (state["keys"] + sign * evicted.keys.sum(1))
        return stored("matrix", left[..., None] * matrix, self.dtype) | new

    def _faded(
        self, layer: LayerLatent, state: State, evicted: Evicted
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows longest 1"], dict[str, Tensor]]:
        """Return what is left of the state and of each new pair at the latest position, and that position."""
        log_kept = layer.log_kept()
        if log_kept is None:
            return torch.ones_like(state["mass"][:, 0]), torch.ones_like(evicted.keys[..., :1]), {}
        positions = evicted.positions.float()
        latest = torch.maximum(state["latest"], positions.amax(1))
        ages = torch.where(evicted.valid, latest[:, None] - positions, 0.0)
        lives, before = (torch.exp(age / INTERVAL * log_kept) for age in (ages, latest - state["latest"]))
        return before, lives[..., None], {"latest": latest}


_SHELF = Shelf("indexmem", Latent.load)
