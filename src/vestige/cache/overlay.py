"""Rerunning tokens of a cache through the model at their positions, to compute new keys and values for them.

The tokens attend to the pairs that the cache holds before them, as views, and to each other, not to their own old
pairs. ``rerun`` returns the new pairs; ``write`` puts them into the slots that the cache still holds.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from vestige.cache.attention import KVHandle
from vestige.cache.kv_cache import KVCache
from vestige.cache.layer import RaggedLayer
from vestige.kernels import AttentionScale, packed, reference
from vestige.models.compat import cache_argument
from vestige.policies.base import Policy

_BLOCK = reference.QUERY_BLOCK


@dataclass(frozen=True)
class Pairs:
    """New keys and values of some tokens, ``batch kv_heads tokens ...``, and side arrays with the same first axes.

    Args:
        keys: Keys after RoPE.
        values: Values as stored.
        annotations: Side arrays by name; those accumulated from queries have their initial value.
    """

    keys: Float[Tensor, "batch kv_heads tokens head_dim"]
    values: Float[Tensor, "batch kv_heads tokens value_dim"]
    annotations: Mapping[str, Tensor]

    def flat(self) -> dict[str, Tensor]:
        """Return all columns as a layer stores them: ``batch * kv_heads * tokens ...``."""
        columns = {"keys": self.keys, "values": self.values, **self.annotations}
        return {name: column.detach().reshape(-1, *column.shape[3:]) for name, column in columns.items()}


class StopForward(Exception):
    """Ends a forward once the last requested layer has its pairs."""


class OverlayCache(Cache):
    """A view of a cache for one forward: it reads the cache's pairs and keeps the new ones to itself.

    Memories are not read: the pairs that they absorbed may come after the tokens.

    Args:
        cache: Read, never changed.
        at: Positions of the tokens, ascending, the same in every batch row.
        until: Layer whose new pairs end the forward, by :class:`StopForward`; None runs it to the end.
    """

    def __init__(self, cache: KVCache, at: Int[Tensor, " tokens"], until: int | None = None) -> None:
        self.cache, self.at, self.until = cache, at, until
        super().__init__(layers=[OverlayLayer(self, layer) for layer in cache.evictable])


class OverlayLayer(CacheLayerMixin):
    """One layer of an overlay."""

    is_sliding = False
    is_compileable = False

    def __init__(self, overlay: OverlayCache, layer: RaggedLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.overlay, self.layer = overlay, layer
        self.hidden: Tensor | None = None
        self.pairs: Pairs | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: an overlay allocates no storage."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Keep the new pairs; return handles that the attention function resolves to this layer."""
        annotations = self.overlay.cache.state.annotate(self.layer.layer_idx, self.hidden, key_states, value_states)
        self.pairs = Pairs(key_states, value_states, annotations)
        if self.overlay.until == self.layer.layer_idx:
            raise StopForward
        shape = torch.Size((*key_states.shape[:2], len(self.overlay.at), key_states.shape[3]))
        handle = KVHandle(self, shape, key_states.dtype, key_states.device)
        return handle, handle

    def get_seq_length(self) -> int:
        """Return the position of the first token."""
        return int(self.overlay.at[0])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return sizes of a mask that is not used: attention masks by position."""
        return query_length, int(self.overlay.at[0])

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length

    def attend(
        self,
        module: nn.Module,
        query: Float[Tensor, "batch heads tokens head_dim"],
        mask: Tensor | None,
        scale: AttentionScale,
        position_bias: Tensor | None,
        options: dict[str, Any],
    ) -> Float[Tensor, "batch tokens heads value_dim"]:
        """Attend over the pairs that the cache holds before each token, and over the tokens' own new pairs."""
        assert self.pairs is not None, "update comes first"
        kv_heads = self.layer.kv_heads
        out = query.new_empty(*query.shape[:3], self.pairs.values.shape[3])
        for row in range(self.layer.rows):
            b, head = divmod(row, kv_heads)
            heads = slice(head * query.shape[1] // kv_heads, (head + 1) * query.shape[1] // kv_heads)
            out[b, heads] = self._attend_row(query[b : b + 1, heads], row, scale.of_group(head, kv_heads))[0]
        return out.transpose(1, 2).contiguous()

    def _attend_row(self, query: Tensor, row: int, scale: AttentionScale) -> Tensor:
        """Attend over the visible pairs of one row and the new pairs, concatenated for this row alone."""
        assert self.pairs is not None
        b, head = divmod(row, self.layer.kv_heads)
        at, held = self.overlay.at, self.layer.positions(row)
        pads, before = torch.searchsorted(held, torch.stack([at[0] * 0, at[-1] + 1]).to(held.dtype)).tolist()
        visible = slice(self.layer.starts[row] + pads, self.layer.starts[row] + before)
        positions = self.layer.columns["positions"][visible]
        others = ~torch.isin(positions, at)
        columns = [self.layer.columns[name][visible] for name in ("keys", "values")]
        if not bool(others.all()):
            positions, columns = positions[others], [column[others] for column in columns]
        own = (self.pairs.keys[b, head], self.pairs.values[b, head])
        keys, values = (torch.cat([old, new.to(old.dtype)])[None, None] for old, new in zip(columns, own, strict=True))
        key_positions = torch.cat([positions.long(), at])
        blocks = []
        for start in range(0, len(at), _BLOCK):
            mask = key_positions <= at[start : start + _BLOCK, None]
            blocks.append(reference.attend_masked(query[:, :, start : start + _BLOCK], keys, values, mask, scale))
        return torch.cat(blocks, 2)


def rerun(cache: KVCache, at: Int[Tensor, " tokens"], *, until: int | None = None) -> dict[int, Pairs]:
    """Return new pairs of tokens by layer index, up to layer ``until``. The cache is not changed.

    The cache's model, which is attached, runs with any adapter that is applied to it.

    Args:
        cache: A cache that has seen the tokens.
        at: Positions of the tokens, ascending, the same in every batch row.
        until: Last layer needed; None runs all.
    """
    at = at.to(cache.layout.device)
    overlay = OverlayCache(cache, at, until)
    ids = torch.stack([row[real][at.cpu()] for row, real in zip(cache.ids, cache.real, strict=True)])
    positions = at.expand(len(ids), -1)
    with contextlib.suppress(StopForward):
        cache.layout.decoder(input_ids=ids.to(at.device), position_ids=positions, **cache_argument(overlay))
    layers: list[Any] = overlay.layers
    return {overlay.layer.layer_idx: overlay.pairs for overlay in layers if overlay.pairs is not None}


def write(cache: KVCache, at: Int[Tensor, " tokens"], new: Mapping[int, Pairs]) -> None:
    """Write new pairs into the slots that the cache still holds for their tokens, in place.

    Side arrays accumulated from queries are not changed.
    """
    query_annotations = _find_query_annotations(cache)
    for layer in cache.evictable:
        slots, source = find_slots(layer, at.to(layer.device))
        for name, column in new[layer.layer_idx].flat().items():
            if name not in query_annotations:
                layer.columns[name].index_copy_(0, slots, column[source].to(layer.columns[name].dtype))


def write_whole(cache: KVCache, at: Int[Tensor, " tokens"], new: Mapping[int, Pairs]) -> None:
    """Write new pairs of all these tokens into the cache, evicted ones included, until the next settle.

    Side arrays accumulated from queries are not changed where the cache held a pair.
    """
    query_annotations = _find_query_annotations(cache)
    for layer in cache.evictable:
        fresh = new[layer.layer_idx].flat()
        fresh["positions"] = at.to(layer.device, torch.int32).repeat(layer.rows)
        stored = len(layer.columns["positions"])
        old, source = find_slots(layer, at.to(layer.device))
        for name in query_annotations & fresh.keys():
            fresh[name] = fresh[name].index_copy(0, source, layer.columns[name][old].to(fresh[name].dtype))
        slots, lengths = layer.live_slots()
        held = layer.columns["positions"][slots]
        row = packed.row_ids(lengths, layer.device)
        kept = ~torch.isin(held, fresh["positions"])
        all_rows = torch.cat([row[kept], torch.arange(layer.rows, device=row.device).repeat_interleave(len(at))])
        positions = torch.cat([held[kept], fresh["positions"]]).long()
        sources = torch.cat([slots[kept], stored + torch.arange(len(fresh["positions"]), device=slots.device)])
        order = torch.argsort(all_rows * (int(positions.max()) + 1) + positions)
        for name, column in layer.columns.items():
            layer.columns[name] = torch.cat([column, fresh[name].to(column.dtype)])
        layer.keep(sources[order], torch.bincount(all_rows, minlength=layer.rows).tolist())


def _find_query_annotations(cache: KVCache) -> set[str]:
    """Return the names of side arrays that policies accumulate from queries."""
    writers = cache.state.recording.writers
    return {name for writer in writers if isinstance(writer, Policy) for name in writer.query_annotations}


def find_slots(layer: RaggedLayer, at: Int[Tensor, " tokens"]) -> tuple[Int[Tensor, " held"], Int[Tensor, " held"]]:
    """Return the slots where a layer holds pairs of these positions, and ``row * tokens + token`` for each slot."""
    slots, sources = [], []
    for row in range(layer.rows):
        held = layer.positions(row)
        found = torch.searchsorted(held, at.to(held.dtype)).clamp_max(max(len(held) - 1, 0))
        tokens = (held[found] == at).nonzero()[:, 0] if len(held) else at[:0]
        slots.append(layer.starts[row] + found[tokens])
        sources.append(row * len(at) + tokens)
    return torch.cat(slots), torch.cat(sources)
