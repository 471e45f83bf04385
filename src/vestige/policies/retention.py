"""Retention: lifetimes from trained gates, independent of question and attention; one top-k over the model."""

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

    A gate gives every new pair a retention ``beta`` in (0, 1). At position t the worth of a pair at position i is
    ``beta^(t+1-i)``, its retention at the next query. Nothing else is used, so it works the same way while a text is
    read, in later turns and while decoding.

    Source: DBTrimKV, arXiv 2605.09649, and its code (nothing is protected, the next query counts); TRIM-KV, arXiv
    2512.03324. With ``horizon=n`` the worth is the sum over the next n queries, as in the paper's theory:
    ``beta^(t+1-i) (1 - beta^n) / (1 - beta)``.
    """

    gates: str | Gates | None = None
    """A folder, a hub id, or `Gates`; None takes those shipped for the model."""
    horizon: int = 1
    """Number of coming queries that count."""
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
        """Load the gates, or check those given; raise a ModelError if none fit the model or they are damaged."""
        self.weights_for(model)

    def weights_for(self, model: PreTrainedModel) -> Gates:
        """Return the gates for a model, as :meth:`bind` loads them: given ones as they are, others in its dtype."""
        return _WEIGHTS.refresh(self.gates, model)

    def annotate(self, new: NewPairs) -> Mapping[str, Tensor]:
        """Return the log beta of new pairs, ``batch kv_heads new``, float32."""
        assert new.hidden is not None and new.model is not None, "the cache shows both"
        return {"log_beta": _WEIGHTS.get(self.gates, new.model)(new.layer_idx, new.hidden)}

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return the log of each pair's worth to the next ``horizon`` queries."""
        ends = torch.empty_like(obs.positions)
        for row in obs.rows():
            ends[row.pairs] = obs.seen[row.batch]
        return compute_log_worth(obs.annotations["log_beta"], (ends - obs.positions).float(), self.horizon)


def compute_log_worth(
    log_beta: Float[Tensor, " pairs"], age: Float[Tensor, " pairs"], horizon: int = 1
) -> Float[Tensor, " pairs"]:
    """Return the log of the sum of ``beta^age, beta^(age+1), ...``, ``horizon`` terms, in closed form.

    ``log_beta`` is not positive; ``age`` counts the tokens from a pair to the next query.
    """
    first = age * log_beta
    if horizon == 1:
        return first
    rate = log_beta.clamp_max(-1e-30)  # at 0 the ratio would be 0 / 0; its limit, the horizon, is reached long before
    return first + torch.log(torch.expm1(horizon * rate) / torch.expm1(rate))


_WEIGHTS = WeightsCache("retention", lambda folder, model: Gates.load(folder, model).for_inference(model.dtype))
