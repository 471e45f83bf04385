"""MomentKV's memory: count, means and value-key covariance of the evicted pairs of each row."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.errors import PolicyError
from vestige.kernels.partial import Partial
from vestige.memory.storage import Dtype, check_dtype, restored, stored
from vestige.remains import Asked, Evicted, Memory, State, log_count


@dataclass(frozen=True, kw_only=True)
class Moments(Memory):
    """Remember count, key mean, value mean and value-key covariance; read them to first order.

    With ``s`` the scaled query: output ``mean_v + cov_vk s``, log of mass ``log n + mean_k s``. Updates are exact
    however the pairs come in pieces (Chan's merge), so nothing depends on chunks but rounding.

    Source: MomentKV, arXiv 2606.01563, whose statistics these are. Differs: it also lets the moments choose what to
    evict, here any policy does; a softcap bends the virtual logit and its slope; the second-order mass is ours.
    RoPE mixes phases in the means of long spans, and an output to first order may leave the hull of the values.

    Weighs, at head size 64, as much as 34 pairs in bfloat16 (8,712 bytes a row; 65 pairs with ``dtype="float32"``):
    it pays once far more than that are evicted. See :meth:`state_bytes`.
    """

    dtype: Dtype = "float16"
    """Of the stored covariances; all else is float32. In float16 small changes are lost beyond some 100,000 pairs."""
    mass: float = 0.0
    """Upper bound of the second-order mass ``s cov_kk s / 2``, which explodes on keys that are not Gaussian; 0 leaves
    it out, and then ``cov_kk`` is not stored."""

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        mass: Any = self.mass
        if not (isinstance(mass, int | float) and mass >= 0):
            raise PolicyError(f"mass must be a number of at least 0, got {mass!r}")

    def empty(self, rows: int, head_dim: int, value_dim: int, device: torch.device | str) -> State:
        """Return the state of rows that absorbed nothing."""
        zeros = {name: torch.zeros(rows, size, device=device) for name, size in _means(head_dim, value_dim).items()}
        shapes = {"key_value": (rows, head_dim, value_dim), "key_key": (rows, head_dim, head_dim)}
        state = {"count": torch.zeros(rows, device=device), **zeros}
        for name in self._covariances:
            state |= stored(name, torch.zeros(shapes[name], device=device), self.dtype)
        return state

    def absorb(self, state: State, evicted: Evicted) -> State:
        """Return the state of rows that absorbed these pairs too."""
        added = evicted.counts.float()
        count = state["count"] + added
        share = (added / count.clamp_min(1))[:, None]  # of the new pairs
        centred, apart, means = {}, {}, {}
        for name, x in (("key", evicted.keys), ("value", evicted.values)):
            mean = x.sum(1) / added.clamp_min(1)[:, None]
            centred[name] = (x - mean[:, None]).masked_fill(~evicted.valid[..., None], 0.0)
            apart[name] = mean - state[f"{name}_mean"]
            means[f"{name}_mean"] = state[f"{name}_mean"] + share * apart[name]
        new = {"count": count, **means}
        for name in self._covariances:
            left, right = name.split("_")
            between = share * (1 - share) * apart[left]
            within = centred[left].mT @ centred[right] / count.clamp_min(1)[:, None, None]
            before = (1 - share)[..., None] * restored(state, name)
            new |= stored(name, before + within + between[:, :, None] * apart[right][:, None], self.dtype)
        return new

    def recall(self, state: State, asked: Asked) -> Partial:
        """Return an estimate of attention over what each row absorbed."""
        queries, cap = asked.queries * asked.scale.scaling, asked.scale.softcap
        logit = torch.bmm(queries, state["key_mean"][..., None])[..., 0]  # (rows, queries)
        if cap is not None:
            logit = asked.scale.capped(logit)
            queries = queries * (1 - (logit / cap).square())[..., None]  # the slope of the cap, at the mean
        output = torch.baddbmm(state["value_mean"][:, None], queries, restored(state, "key_value"))
        lse = log_count(state["count"])[:, None] + logit
        if self.mass:
            lse = lse + self._second_order(queries, restored(state, "key_key"))
        return Partial(output, lse)

    def _second_order(
        self, bent: Float[Tensor, "rows queries head_dim"], covariance: Float[Tensor, "rows head_dim head_dim"]
    ) -> Float[Tensor, "rows queries"]:
        """Return what the spread of the logits adds to the log of their mass, were they Gaussian."""
        spread: Tensor = ((bent @ covariance) * bent).sum(-1) / 2
        return spread.clamp(0.0, float(self.mass))

    @property
    def _covariances(self) -> tuple[str, ...]:
        return ("key_value", "key_key") if self.mass else ("key_value",)


def _means(head_dim: int, value_dim: int) -> dict[str, int]:
    return {"key_mean": head_dim, "value_mean": value_dim}
