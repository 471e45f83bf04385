"""Showing new queries, while they attend, to whatever looks at every one of them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from vestige.cache.forward_pass import ForwardPass
from vestige.kernels import AttentionScale
from vestige.kernels.packed import PAIR
from vestige.policies.observation import LayerView, RowView

if TYPE_CHECKING:
    from vestige.cache.layer import RaggedLayer


def show(
    layer: "RaggedLayer",
    query: Float[Tensor, "batch heads new head_dim"],
    hidden: Float[Tensor, "batch new hidden"] | None,
    step: ForwardPass,
    scale: AttentionScale,
) -> None:
    """Show new queries row by row, and layer by layer to those who want that; their own pairs are stored already.

    Args:
        layer: Whose recording says who is shown what.
        query: After RoPE.
        hidden: What entered the attention module, if that is recorded.
        step: The forward.
        scale: Of the layer.
    """
    recording = layer.cache.recording
    for b in range(layer.batch_size):
        if not len(new := step.valid(b)):
            continue
        queries, at = query[b, :, new], step.positions[b, new].long()
        if recording.watchers:
            for row in _rows(layer, b, queries, at, scale):
                for watch in recording.watchers:
                    watch(row)
        if recording.layer_watchers:
            glance = _whole(layer, b, queries, None if hidden is None else hidden[b, new].detach(), at, scale)
            for watch_layer in recording.layer_watchers:
                watch_layer(glance)


def _whole(
    layer: "RaggedLayer",
    b: int,
    queries: Float[Tensor, "heads new head_dim"],
    hidden: Float[Tensor, "new hidden"] | None,
    at: Int[Tensor, " new"],
    scale: AttentionScale,
) -> LayerView:
    slots, heads = layer.slots_of(b)
    return LayerView(
        layer_idx=layer.layer_idx,
        model=layer.cache.anatomy.model,
        queries=queries,
        hidden=hidden,
        query_positions=at,
        make_rows=lambda: tuple(_rows(layer, b, queries, at, scale)),
        slots={name: column[slots] for name, column in layer.columns.items() if name not in PAIR},
        heads=heads,
    )


def _rows(
    layer: "RaggedLayer",
    b: int,
    queries: Float[Tensor, "heads new head_dim"],
    at: Int[Tensor, " new"],
    scale: AttentionScale,
) -> Iterator[RowView]:
    for kv_head, group in enumerate(queries.chunk(layer.kv_heads)):
        row = b * layer.kv_heads + kv_head
        pairs = slice(layer.starts[row], layer.starts[row] + layer.lengths[row])
        yield RowView(
            layer_idx=layer.layer_idx,
            batch=b,
            kv_head=kv_head,
            queries=group,
            query_positions=at,
            attention=scale.of_group(kv_head, layer.kv_heads),
            **{name: layer.columns[name].detach()[pairs] for name in PAIR},
            annotations=layer.annotations(row),
        )
