"""Showing new queries, while they attend, to whatever looks at every one of them."""

from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from vestige.kernels import AttentionScale
from vestige.observe import Glance, LayerGlance

if TYPE_CHECKING:
    from vestige.layers import RaggedLayer, Step

PAIR = ("keys", "values", "positions")
"""Columns of every layer; the others are side arrays."""


def show(
    layer: "RaggedLayer",
    query: Float[Tensor, "batch heads new head_dim"],
    hidden: Float[Tensor, "batch new hidden"] | None,
    step: "Step",
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
        groups = queries.chunk(layer.kv_heads)
        rows = tuple(_glance(layer, b, kv_head, group, at, scale) for kv_head, group in enumerate(groups))
        for watch in recording.watchers:
            for row in rows:
                watch(row)
        if not recording.layer_watchers:
            continue
        glance = LayerGlance(
            layer_idx=layer.layer_idx,
            model=layer.cache.anatomy.model,
            queries=queries,
            hidden=None if hidden is None else hidden[b, new].detach(),
            at=at,
            rope=layer.cache.rope,
            rows=rows,
        )
        for watch_layer in recording.layer_watchers:
            watch_layer(glance)


def _glance(
    layer: "RaggedLayer",
    b: int,
    kv_head: int,
    queries: Float[Tensor, "queries_per_kv new head_dim"],
    at: Int[Tensor, " new"],
    scale: AttentionScale,
) -> Glance:
    row = b * layer.kv_heads + kv_head
    pairs = slice(layer.starts[row], layer.starts[row] + layer.lengths[row])
    return Glance(
        layer_idx=layer.layer_idx,
        batch=b,
        kv_head=kv_head,
        queries=queries,
        at=at,
        attention=scale.of_group(kv_head, layer.kv_heads),
        **{name: layer.columns[name].detach()[pairs] for name in PAIR},
        annotations=layer.annotations(row),
    )
