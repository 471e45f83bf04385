"""AdaKV: SnapKV's scores, with the heads of a layer competing for its budget."""

from dataclasses import dataclass

from vestige.policies.selection import Share
from vestige.policies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """Keep SnapKV's tokens in one top-k over the heads of a layer: heads that spread their attention keep more.

    Source: AdaKV, arXiv 2407.11550, on SnapKV's score; ``floor`` is its safeguard alpha. With one KV head it is SnapKV.
    Differs: the score is :class:`SnapKV`'s, with its differences. The floor is a share of the whole average budget,
    protected pairs included, as in kvpress, so with a small budget it lies below sink and window and has no effect; the
    authors' code takes a share of the budget beyond the window.
    """

    share: Share = "layer"
    floor: float = 0.2
