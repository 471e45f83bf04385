"""Any scorer written for kvpress as a policy: its scores, our memory, budgets, turns and chunks."""

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
    """Return a policy that asks a kvpress scorer what pairs are worth. kvpress itself is not imported.

    Args:
        press: Anything with ``score(module, hidden_states, keys, values, attentions, kwargs)`` that returns ``batch
            kv_heads held``, as subclasses of kvpress's ScorerPress do.
        budget: What may be kept; None takes what the press's own ``compression_ratio`` leaves.
        options: Fields of :class:`FromKVPress`, such as ``keys_only``, and of any policy, such as ``share``.

    Raises:
        PolicyError: The object has no ``score``, or neither a budget nor a compression ratio is there.
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

    The press is handed what it would find in kvpress: the attention module, the latest hidden states with their
    ``position_embeddings``, no attentions, and the pairs held as ``batch kv_heads held head_dim``. So all rows of a
    layer must hold equally many pairs, which share="head" sees to; a press that looks at keys and values alone
    (``keys_only``) is handed row by row where they do not. A press that takes the last keys for those of the last
    hidden states needs a ``window`` no shorter than its own, so that these keys are there. Not served: a
    press that needs a whole text's hidden states, ``post_init_from_model``, or ``module.rotary_emb``, which kvpress
    puts into the model.

    Source: the interface ScorerPress of kvpress, arXiv 2510.00636. Differs: the press's compression ratio is not
    looked at when it scores; who competes for room, what is protected, and when, are this library's.
    """

    press: Any
    """The scorer. It is called under ``torch.no_grad`` and must not modify what it is given."""
    keys_only: bool = False
    """Whether the press looks at keys and values alone: then it gets empty hidden states."""
    hidden_observed: int = 128
    """Latest tokens whose hidden states the press gets; 0 keeps none and hands over empty ones."""
    scale: Scale = "signed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_observed < 0:
            raise PolicyError(f"hidden_observed must not be negative, got {self.hidden_observed!r}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # what a press needs is said by its owner
        """Hidden states and their rotation, unless the press does without."""
        return frozenset({"hidden", "rope"}) if self._looks_back else frozenset()

    @property
    def _looks_back(self) -> bool:
        return self.hidden_observed > 0 and not self.keys_only

    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return the press's scores.

        Raises:
            PolicyError: Rows or batch rows are unequal, the press failed, or gave scores of another shape.
        """
        if not len(seen.positions):
            return torch.zeros(0, device=seen.keys.device)
        lengths = {end - start for start, end in pairwise(seen.cu_seqlens)}
        if len(lengths) == 1:
            return self._ask(seen, slice(None), len(seen.seen), seen.kv_heads).flatten()
        if not self.keys_only:
            raise PolicyError(
                f"{self._name} scores all rows of a layer at once, so they must hold equally many pairs, but layer "
                f'{seen.layer_idx} holds {min(lengths)} to {max(lengths)}; use share="head" and batch rows of one '
                "length, or keys_only=True if the press looks at keys and values alone"
            )
        scores = torch.zeros(len(seen.positions), device=seen.keys.device)
        for row in seen.rows():
            scores[row.pairs] = self._ask(seen, row.pairs, 1, 1).flatten()
        return scores

    @property
    def _name(self) -> str:
        return type(self.press).__name__

    def _ask(
        self, seen: Observation, pairs: slice, batch: int, kv_heads: int
    ) -> Float[Tensor, "_batch _kv_heads _row_held"]:
        """Hand packed rows of one length over as one tensor and return the scores."""
        keys, values = (x[pairs].unflatten(0, (batch, kv_heads, -1)) for x in (seen.keys, seen.values))
        hidden, kwargs = self._looked_back(seen) if self._looks_back else (keys.new_empty(batch, 0, 0), {})
        try:
            scores = self.press.score(seen.module, hidden, keys, values, None, kwargs)
        except Exception as error:  # foreign code: what it asserts is mostly about lengths, which are options here
            raise PolicyError(
                f"{self._name} failed on {keys.shape[2]} pairs a row and {hidden.shape[1]} hidden states "
                f"(hidden_observed={self.hidden_observed}, keys_only={self.keys_only}): {str(error) or repr(error)}"
            ) from error
        if not isinstance(scores, Tensor) or scores.shape != keys.shape[:3]:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise PolicyError(f"{self._name} gave scores {got}, expected {tuple(keys.shape[:3])}")
        return scores.float()

    def _looked_back(self, seen: Observation) -> tuple[Float[Tensor, "batch latest hidden"], dict[str, Any]]:
        """Return the latest hidden states of all batch rows and their position embeddings."""
        assert seen.rope is not None, "the cache knows the rotation for every policy that needs it"
        if len(set(seen.seen)) > 1:
            raise PolicyError(
                f"{self._name} gets the latest hidden states of all batch rows at once, so they must have seen equally "
                f"many tokens, but they saw {min(seen.seen)} to {max(seen.seen)}; read them apart, or use "
                "keys_only=True if the press looks at keys and values alone"
            )
        latest, end = min(map(len, seen.hidden)), seen.seen[0]  # a crop can leave batch rows unequally many
        hidden = torch.stack([x[len(x) - latest :] for x in seen.hidden])
        positions = torch.arange(end - hidden.shape[1], end, device=hidden.device).expand(len(hidden), -1)
        return hidden, {"position_embeddings": seen.rope.embeddings(hidden, positions, seen.layer_idx)}
