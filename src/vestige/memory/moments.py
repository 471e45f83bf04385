"""MomentKV's memory: count, means and value-key covariance of the evicted pairs of each row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.errors import PolicyError
from vestige.kernels.merge import PartialAttention
from vestige.memory.base import EvictedPairs, Memory, MemoryQuery, State, log_count
from vestige.memory.storage import Dtype, check_dtype, decode, encode


@dataclass(frozen=True, kw_only=True)
class Moments(Memory):
    """Remember count, key mean, value mean and value-key covariance; read them to first order.

    With ``s`` the scaled query: output ``mean_v + cov_vk s``, log of mass ``log n + mean_k s``. Updates are exact
    for any split of the pairs (Chan's merge), so chunks affect only rounding.

    Source: MomentKV, arXiv 2606.01563, whose statistics these are. Differs: it also uses the moments to choose
    the pairs to evict, here any policy does; a softcap bends the virtual logit and its slope; the second-order mass is
    ours. RoPE mixes phases in the means of long spans, and a first-order output may leave the hull of the values.

    Weighs, at head size 64, as much as 34 pairs in bfloat16 (8,716 bytes a row; 65 pairs with ``dtype="float32"``):
    it pays off once far more pairs are evicted. See :meth:`state_bytes`.
    """

    dtype: Dtype = "float16"
    """Dtype of the stored covariances; all else is float32. float16 loses small changes beyond some 100,000 pairs."""
    mass: float = 0.0
    """Upper bound of the second-order mass ``s cov_kk s / 2``, which explodes for non-Gaussian keys; 0 leaves it out,
    and then ``cov_kk`` is not stored."""

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        mass: Any = self.mass
        if not (isinstance(mass, int | float) and mass >= 0):
            raise PolicyError(f"mass must be a number of at least 0, got {mass!r}")

    def empty(self, rows: int, head_dim: int, value_dim: int, device: torch.device | str) -> State:
        """Return the state of rows that absorbed nothing."""
        widths = {"value": value_dim, "key": head_dim}
        means = {name: torch.zeros(rows, 1, width, device=device) for name, width in widths.items()}
        covariances = {
            name: torch.zeros(rows, head_dim, widths[name.split("_")[1]], device=device) for name in self._covariances
        }
        return self._make_state(torch.zeros(rows, device=device), means, covariances)

    def absorb(self, state: State, evicted: EvictedPairs) -> State:
        """Return the state of rows that absorbed these pairs too."""
        added = evicted.counts.float()
        count = state["count"] + added
        share = (added / count.clamp_min(1))[:, None, None]  # of the new pairs
        centred, apart, means, covariances = {}, {}, {}, {}
        earlier = {"key": state["key_mean"].mT, "value": state["value_mean"]}
        for name, x in (("key", evicted.keys), ("value", evicted.values)):
            mean = x.sum(1, keepdim=True) / added.clamp_min(1)[:, None, None]
            centred[name] = (x - mean).masked_fill(~evicted.valid[..., None], 0.0)
            apart[name] = mean - earlier[name]
            means[name] = earlier[name] + share * apart[name]
        for name in self._covariances:
            left, right = name.split("_")
            within = centred[left].mT @ centred[right] / count.clamp_min(1)[:, None, None]
            between = share * (1 - share) * apart[left].mT @ apart[right]
            covariances[name] = (1 - share) * decode(state, name) + within + between
        return self._make_state(count, means, covariances)

    def recall(self, state: State, query: MemoryQuery) -> PartialAttention:
        """Return an estimate of attention over the absorbed pairs of each row."""
        queries, cap = query.queries * query.scale.scaling, query.scale.softcap
        if cap is None:
            lse = torch.baddbmm(state["log_count"], queries, state["key_mean"])
        else:
            logit = query.scale.capped(queries @ state["key_mean"])  # (rows, queries, 1)
            queries = queries * (1 - (logit / cap).square())  # the slope of the cap, at the mean
            lse = state["log_count"] + logit
        output = torch.baddbmm(state["value_mean"], queries, decode(state, "key_value"))
        if self.mass:
            lse = lse + self._compute_second_order(queries, decode(state, "key_key"))
        return PartialAttention(output, lse[..., 0])

    def _compute_second_order(
        self, bent: Float[Tensor, "rows queries head_dim"], covariance: Float[Tensor, "rows head_dim head_dim"]
    ) -> Float[Tensor, "rows queries 1"]:
        """Return the contribution of the logits' variance to the log mass of Gaussian logits."""
        spread: Tensor = ((bent @ covariance) * bent).sum(-1, keepdim=True) / 2
        return spread.clamp(0.0, float(self.mass))

    def _make_state(self, count: Tensor, means: Mapping[str, Tensor], covariances: Mapping[str, Tensor]) -> State:
        """Return moments in the layout that `recall` needs, since it runs at every token."""
        state = {"count": count, "log_count": log_count(count)[:, None, None]}
        state |= {"key_mean": means["key"].mT.contiguous(), "value_mean": means["value"]}
        for name, x in covariances.items():
            state |= encode(name, x, self.dtype)
        return state

    @property
    def _covariances(self) -> tuple[str, ...]:
        return ("key_value", "key_key") if self.mass else ("key_value",)
