"""Reports of a cache: pairs held, bytes and seconds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vestige.cache.layer import RaggedLayer
from vestige.cache.other_layers import find_tensors
from vestige.cache.state import CacheState


@dataclass(frozen=True)
class LayerReport:
    """Pairs held by the rows of one layer."""

    layer_idx: int
    rows: tuple[int, ...]
    """Pairs of each row, in (batch, kv_head) order."""
    seen: int
    """Average number of tokens that each row has seen."""


@dataclass(frozen=True)
class Report:
    """A snapshot of a cache. Bytes are those of live storage: free slots, side arrays and query rings included."""

    seen: tuple[int, ...]
    """Tokens of each batch row, pads not counted."""
    held: int
    """Pairs stored, over evictable layers and rows."""
    full: int
    """Pairs that a cache without eviction would store."""
    kv_bytes: int
    peak_kv_bytes: int
    """Largest ``kv_bytes`` so far, including copies made by a compaction."""
    full_kv_bytes: int
    """Bytes that a DynamicCache would need for the evictable layers."""
    other_kv_bytes: int
    """Bytes of sliding, linear and other layers, which are never evicted."""
    memory_bytes: int
    """Bytes of the memory of evicted pairs; part of ``kv_bytes``."""
    evict_s: float
    """Seconds spent on scoring, selecting and compacting."""
    budget_total: int | None
    """Most pairs that the cache holds after a settle now; None if it never evicts."""
    policy: str
    share: str
    layers: tuple[LayerReport, ...]
    annotate_s: float = 0.0
    """Seconds spent on computing side arrays for new pairs."""

    @property
    def kept_fraction(self) -> float:
        """Held over full; 1.0 for an empty cache."""
        return self.held / self.full if self.full else 1.0

    @property
    def compression_ratio(self) -> float:
        """Evicted over full."""
        return 1.0 - self.kept_fraction

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain numbers for JSON, layers included."""
        return asdict(self) | {"kept_fraction": self.kept_fraction}

    def __str__(self) -> str:
        least = min((min(layer.rows, default=0) for layer in self.layers), default=0)
        most = max((max(layer.rows, default=0) for layer in self.layers), default=0)
        memory = f"; memory {self.memory_bytes:,}" if self.memory_bytes else ""
        lines = [
            f"policy {self.policy}, share {self.share}: seen {' '.join(map(str, self.seen))}, held {self.held} of "
            f"{self.full} pairs ({self.kept_fraction:.1%}), {least} to {most} a row",
            f"bytes {self.kv_bytes:,} (peak {self.peak_kv_bytes:,}; unevicted {self.full_kv_bytes:,}; other layers "
            f"{self.other_kv_bytes:,}{memory}), {self.evict_s:.3f} s evicting",
            *(
                f"layer {layer.layer_idx:>3}: min {min(layer.rows)} max {max(layer.rows)} "
                f"mean {sum(layer.rows) / len(layer.rows):.1f}"
                for layer in self.layers
                if layer.rows
            ),
        ]
        return "\n".join(lines)


def make_report(state: CacheState, layers: Sequence[object]) -> Report:
    """Return the report of a cache with this state and these layers."""
    evictable = [layer for layer in layers if isinstance(layer, RaggedLayer)]
    tokens, rows = sum(state.seen), state.footprint().rows
    pairs = [layer.live_lengths() for layer in evictable]
    unlimited = state.policy.budget is None or not state.seen
    return Report(
        seen=state.seen,
        held=sum(map(sum, pairs)),
        full=tokens * rows,
        kv_bytes=state.nbytes,
        peak_kv_bytes=max(state.peak_kv_bytes, state.nbytes),
        full_kv_bytes=sum(layer.dynamic_bytes for layer in evictable),
        other_kv_bytes=sum(
            x.nbytes for layer in layers if not isinstance(layer, RaggedLayer) for x in find_tensors(layer)
        ),
        memory_bytes=sum(layer.memory_bytes for layer in evictable),
        evict_s=state.evict_s,
        annotate_s=state.annotate_s,
        budget_total=None if unlimited else sum(state.pair_limits()) * rows,
        policy=type(state.policy).__name__,
        share=state.policy.share,
        layers=tuple(
            LayerReport(layer.layer_idx, tuple(lengths), tokens // max(len(state.seen), 1))
            for layer, lengths in zip(evictable, pairs, strict=True)
        ),
    )
