"""Passing new queries to policies that observe every query, with views of the rows that they attend to."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vestige.cache.forward_pass import ForwardPass
from vestige.cache.recording import RecordingSpec
from vestige.kernels import AttentionScale
from vestige.kernels.packed import PAIR
from vestige.models.rope import Rope
from vestige.policies.observation import LayerView, RowView

_BLOCK = 1024
"""Queries per block whose RoPE is undone."""


@runtime_checkable
class Rows(Protocol):
    """The part of a layer that observers may see: its columns, and the slots of each row."""

    layer_idx: int
    kv_heads: int
    columns: dict[str, Tensor]

    def slots_of_row(self, row: int) -> slice:
        """Return the slots of one row's pairs."""

    def slots_of_batch_row(self, b: int) -> tuple[slice, Int[Tensor, " slots"]]:
        """Return the slots of a batch row, free ones included, and the KV head of each."""

    def annotations(self, row: int) -> Mapping[str, Tensor]:
        """Return views of one row's side arrays."""


def unrotated_blocks(
    query: Float[Tensor, "batch heads new head_dim"], step: ForwardPass, rope: Rope, layer_idx: int
) -> Iterator[tuple[Float[Tensor, "batch heads block head_dim"], ForwardPass]]:
    """Yield float32 queries without RoPE, in blocks, which bound the memory of the copy."""
    for start in range(0, step.new, _BLOCK):
        part = replace(step, positions=step.positions[:, start : start + _BLOCK])
        block = query[:, :, start : start + _BLOCK].float()
        yield rope.unrotate(block, part.positions, layer_idx), part


def notify_observers(
    recording: RecordingSpec,
    model: PreTrainedModel,
    rows: Rows,
    query: Float[Tensor, "batch heads new head_dim"],
    hidden: Float[Tensor, "batch new hidden"] | None,
    step: ForwardPass,
    scale: AttentionScale,
) -> None:
    """Pass new queries, whose pairs are stored already, to every observer, row by row or layer by layer.

    Args:
        recording: Holds the observers.
        model: The whole model.
        rows: The layer's storage.
        query: New queries, after RoPE.
        hidden: Input of the attention module, if that is recorded.
        step: The current forward.
        scale: Scale of the layer's attention.
    """
    for b in range(query.shape[0]):
        if not len(new := step.find_valid(b)):
            continue
        queries, positions = query[b, :, new], step.positions[b, new].long()
        if recording.watchers:
            for view in _make_row_views(rows, b, queries, positions, scale):
                for watch in recording.watchers:
                    watch(view)
        if recording.layer_watchers:
            inputs = None if hidden is None else hidden[b, new].detach()
            layer_view = _make_layer_view(model, rows, b, queries, inputs, positions, scale)
            for watch_layer in recording.layer_watchers:
                watch_layer(layer_view)


def _make_layer_view(
    model: PreTrainedModel,
    rows: Rows,
    b: int,
    queries: Float[Tensor, "heads new head_dim"],
    hidden: Float[Tensor, "new hidden"] | None,
    positions: Int[Tensor, " new"],
    scale: AttentionScale,
) -> LayerView:
    slots, heads = rows.slots_of_batch_row(b)
    return LayerView(
        layer_idx=rows.layer_idx,
        model=model,
        queries=queries,
        hidden=hidden,
        query_positions=positions,
        make_rows=lambda: tuple(_make_row_views(rows, b, queries, positions, scale)),
        slots={name: column[slots] for name, column in rows.columns.items() if name not in PAIR},
        heads=heads,
    )


def _make_row_views(
    rows: Rows,
    b: int,
    queries: Float[Tensor, "heads new head_dim"],
    positions: Int[Tensor, " new"],
    scale: AttentionScale,
) -> Iterator[RowView]:
    for kv_head, group in enumerate(queries.chunk(rows.kv_heads)):
        row = b * rows.kv_heads + kv_head
        pairs = rows.slots_of_row(row)
        yield RowView(
            layer_idx=rows.layer_idx,
            batch=b,
            kv_head=kv_head,
            queries=group,
            query_positions=positions,
            attention=scale.of_group(kv_head, rows.kv_heads),
            **{name: rows.columns[name].detach()[pairs] for name in PAIR},
            annotations=rows.annotations(row),
        )
