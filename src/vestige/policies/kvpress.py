"""Adapter that uses a scorer written for kvpress as a policy."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.budget import Budget
from vestige.errors import PolicyError
from vestige.policies.base import Policy
from vestige.policies.observation import Observation
from vestige.policies.selection import Scale


def from_kvpress(press: Any, *, budget: Budget | None = None, **options: Any) -> "FromKVPress":
    """Return a policy that scores pairs with a kvpress scorer. kvpress itself is not imported.

    Args:
        press: An object with ``score(module, hidden_states, keys, values, attentions, kwargs)`` that returns ``batch
            kv_heads held``, as subclasses of kvpress's ScorerPress do.
        budget: Average pairs per row; None takes the share that the press's ``compression_ratio`` leaves.
        options: Fields of :class:`FromKVPress`, such as ``keys_only``, and of any policy, such as ``share``.

    Raises:
        PolicyError: The object has no ``score``, or has no compression ratio and no budget was given.
    """
    if not callable(getattr(press, "score", None)):
        raise PolicyError(
            f"{type(press).__name__} has no score(module, hidden_states, keys, values, attentions, kwargs); "
            "presses that compress in another way cannot be used"
        )
    if budget is None:
        ratio = getattr(press, "compression_ratio", None)
        if not (isinstance(ratio, int | float) and 0 < ratio < 1):
            raise PolicyError(
                f"from_kvpress needs a budget, or a press with a compression_ratio between 0 and 1, got {ratio!r}"
            )
        budget = Budget.fraction(1 - ratio)
    return FromKVPress(press=press, budget=budget, **options)


@dataclass(frozen=True, kw_only=True)
class FromKVPress(Policy):
    """Keep what a kvpress scorer scores highest.

    The press gets the same arguments as in kvpress: the attention module, the latest hidden states with their
    ``position_embeddings``, no attentions, and the held pairs as ``batch kv_heads held head_dim``. So all rows of a
    layer must hold the same number of pairs, which share="head" ensures; a press that uses keys and values alone
    (``keys_only``) is otherwise called row by row. A press that pairs the last keys with the last hidden states needs a
    ``window`` no shorter than its own, so that these keys are held. Not supported: a press that needs a whole text's
    hidden states, ``post_init_from_model``, or ``module.rotary_emb``, which kvpress puts into the model.

    Source: the interface ScorerPress of kvpress, arXiv 2510.00636. Differs: the press's compression ratio is ignored
    when it scores; this library determines the competition, the protection, and the time of an eviction.
    """

    press: Any
    """The scorer. It is called under ``torch.no_grad`` and must not modify what it is given."""
    keys_only: bool = False
    """Whether the press uses keys and values alone; it then gets empty hidden states."""
    hidden_observed: int = 128
    """Latest tokens whose hidden states the press gets; 0 records none and passes empty ones."""
    scale: Scale = "signed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_observed < 0:
            raise PolicyError(f"hidden_observed must not be negative, got {self.hidden_observed!r}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # depends on the options
        """Hidden states and their rotation, unless the press needs neither."""
        return frozenset({"hidden", "rope"}) if self._uses_hidden else frozenset()

    @property
    def _uses_hidden(self) -> bool:
        return self.hidden_observed > 0 and not self.keys_only

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return the press's scores.

        Raises:
            PolicyError: Rows or batch rows are unequal, or the press failed or returned scores of another shape.
        """
        if not len(obs.positions):
            return torch.zeros(0, device=obs.keys.device)
        lengths = {end - start for start, end in pairwise(obs.cu_seqlens)}
        if len(lengths) == 1:
            return self._call_press(obs, slice(None), len(obs.seen), obs.kv_heads).flatten()
        if not self.keys_only:
            raise PolicyError(
                f"{self._name} scores all rows of a layer at once, so they must hold equally many pairs, but layer "
                f'{obs.layer_idx} holds {min(lengths)} to {max(lengths)}; use share="head" and batch rows of one '
                "length, or keys_only=True if the press looks at keys and values alone"
            )
        scores = torch.zeros(len(obs.positions), device=obs.keys.device)
        for row in obs.rows():
            scores[row.pairs] = self._call_press(obs, row.pairs, 1, 1).flatten()
        return scores

    @property
    def _name(self) -> str:
        return type(self.press).__name__

    def _call_press(
        self, obs: Observation, pairs: slice, batch: int, kv_heads: int
    ) -> Float[Tensor, "_batch _kv_heads _row_held"]:
        """Call the press on packed rows of one length, as one tensor, and return its scores."""
        keys, values = (x[pairs].unflatten(0, (batch, kv_heads, -1)) for x in (obs.keys, obs.values))
        hidden, kwargs = self._gather_hidden(obs) if self._uses_hidden else (keys.new_empty(batch, 0, 0), {})
        try:
            scores = self.press.score(obs.module, hidden, keys, values, None, kwargs)
        except Exception as error:  # foreign code: most of its assertions are about lengths, which are options here
            raise PolicyError(
                f"{self._name} failed on {keys.shape[2]} pairs a row and {hidden.shape[1]} hidden states "
                f"(hidden_observed={self.hidden_observed}, keys_only={self.keys_only}): {str(error) or repr(error)}"
            ) from error
        if not isinstance(scores, Tensor) or scores.shape != keys.shape[:3]:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise PolicyError(f"{self._name} gave scores {got}, expected {tuple(keys.shape[:3])}")
        return scores.float()

    def _gather_hidden(self, obs: Observation) -> tuple[Float[Tensor, "batch latest hidden"], dict[str, Any]]:
        """Return the latest hidden states of all batch rows and their position embeddings."""
        assert obs.rope is not None, "the cache knows the rotation for every policy that needs it"
        if len(set(obs.seen)) > 1:
            raise PolicyError(
                f"{self._name} gets the latest hidden states of all batch rows at once, so they must have seen equally "
                f"many tokens, but they saw {min(obs.seen)} to {max(obs.seen)}; read them apart, or use "
                "keys_only=True if the press looks at keys and values alone"
            )
        latest, end = min(map(len, obs.hidden)), obs.seen[0]  # a crop can leave batch rows of unequal length
        hidden = torch.stack([x[len(x) - latest :] for x in obs.hidden])
        positions = torch.arange(end - hidden.shape[1], end, device=hidden.device).expand(len(hidden), -1)
        return hidden, {"position_embeddings": obs.rope.embeddings(hidden, positions, obs.layer_idx)}
