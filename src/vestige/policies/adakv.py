"""Keep what the latest queries attend to, with the heads of a layer competing for its room."""

from dataclasses import dataclass

from vestige.policies.selection import Share
from vestige.policies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """Keep SnapKV's tokens in one top-k over the heads of a layer: heads that spread their attention keep more.

    Source: AdaKV, arXiv 2407.11550, on SnapKV's score; ``floor`` is its safeguard alpha. With one KV head it is SnapKV.
    Differs: the score is :class:`SnapKV`'s, with its differences; the floor is a share of the whole average budget,
    protected pairs included, as in kvpress, so that a small budget's floor lies below sink and window and guards
    nothing more; the authors' code takes it of what is left beyond the window.
    """

    share: Share = "layer"
    floor: float = 0.2
