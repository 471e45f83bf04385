"""Keep what trained gates gave a long life: no question, no attention needed, one top-k over the whole model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from vestige.errors import PolicyError
from vestige.nn.pretrained import WeightsCache
from vestige.nn.retention_gates import Gates
from vestige.policies.base import NewPairs, Policy
from vestige.policies.observation import Observation
from vestige.policies.selection import Share


@dataclass(frozen=True, kw_only=True)
class Retention(Policy):
    """Keep the pairs whose retention, a trained number that decays with age, is largest: one top-k model-wide.

    A gate gives every pair, when it is written, a retention ``beta`` in (0, 1). At position t a pair of position i is
    worth ``beta^(t+1-i)``, what is left of it when the next query comes. Nothing else is looked at, so it works alike
    while a text is read, in later turns and while decoding.

    Source: DBTrimKV, arXiv 2605.09649, and its code (nothing is protected, the next query counts); TRIM-KV, arXiv
    2512.03324. With ``horizon=n`` the worth is the sum over the next n queries, as in the paper's theory:
    ``beta^(t+1-i) (1 - beta^n) / (1 - beta)``.
    """

    gates: str | Gates | None = None
    """A folder, a hub id, or gates at hand; None takes those that are shipped for the model."""
    horizon: int = 1
    """Coming queries that count."""
    share: Share = "model"
    sink: int = 0
    window: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    annotations: ClassVar[frozenset[str]] = frozenset({"log_beta"})
    annotation_options: ClassVar[tuple[str, ...]] = ("gates",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.horizon < 1:
            raise PolicyError(f"horizon must be at least 1, got {self.horizon!r}")

    def bind(self, model: PreTrainedModel) -> None:
        """Read the gates, or look at those at hand.

        Raises:
            ModelError: There are none, they are damaged, or they are another model's.
        """
        self.weights_for(model)

    def weights_for(self, model: PreTrainedModel) -> Gates:
        """Return the gates for a model: those at hand as they are, others to compute in its dtype.

        Raises:
            ModelError: As :meth:`bind`.
        """
        return _SHELF.refresh(self.gates, model)

    def annotate(self, written: NewPairs) -> Mapping[str, Tensor]:
        """Return log beta of new pairs, ``batch kv_heads new``, float32."""
        assert written.hidden is not None and written.model is not None, "the cache shows both"
        return {"log_beta": _SHELF.get(self.gates, written.model)(written.layer_idx, written.hidden)}

    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return the log of what each pair is worth to the next ``horizon`` queries."""
        ends = torch.empty_like(seen.positions)
        for row in seen.rows():
            ends[row.pairs] = seen.seen[row.batch]
        return worth(seen.annotations["log_beta"], (ends - seen.positions).float(), self.horizon)


def worth(log_beta: Float[Tensor, " pairs"], age: Float[Tensor, " pairs"], horizon: int = 1) -> Float[Tensor, " pairs"]:
    """Return the log of the sum of ``beta^age, beta^(age+1), ...``, ``horizon`` terms, in closed form.

    Args:
        log_beta: Not positive.
        age: Tokens from the pair to the next query.
        horizon: Terms; with 1 this is ``age * log_beta``.
    """
    first = age * log_beta
    if horizon == 1:
        return first
    rate = log_beta.clamp_max(-1e-30)  # at 0 the ratio would be 0 / 0; its limit, the horizon, is reached long before
    return first + torch.log(torch.expm1(horizon * rate) / torch.expm1(rate))


_SHELF = WeightsCache("retention", lambda folder, model: Gates.load(folder, model).for_inference(model.dtype))
