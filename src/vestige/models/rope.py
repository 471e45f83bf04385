"""Rotary positions: turning keys and queries by positions, back again, and by the average of a span of positions.

Only arithmetic is here. :meth:`~vestige.models.layout.ModelLayout.rope` finds how a layer's own code makes angles and
applies them; both are used as they are, so partial, interleaved and scaled rotations need no code of ours.
A rotation is linear in what it turns and in its (cosine, sine), which gives two more operations:
with cosine and sine divided by the square of their length, and the sine negated, it undoes itself; with averaged
cosines and sines it is the average rotation.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """How one layer turns keys and queries.

    Args:
        angles: From a tensor that gives dtype and device, and ``batch tokens`` positions: cosines and sines, ``batch
            tokens rotary``, with the factor that some models put on them. A layer without RoPE has ones and zeros.
        turn: From ``batch heads tokens head_dim`` vectors, cosines and sines: the vectors turned.
    """

    angles: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    turn: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Rope:
    """How a model's layers turn keys and queries by their positions.

    Vectors come as ``... tokens head_dim``, positions as ``tokens`` (the same for all leading axes) or ``batch
    tokens``, where batch is the first axis of the vectors. Everything is computed in float32 or wider and returned in
    the dtype that came; nothing is modified.

    Args:
        layers: By layer index; layers that cannot be evicted are not among them.
    """

    layers: Mapping[int, Rotation]

    def rotate(
        self, x: Float[Tensor, "*lead tokens head_dim"], positions: Int[Tensor, "*batch tokens"], layer_idx: int
    ) -> Float[Tensor, "*lead tokens head_dim"]:
        """Return vectors turned by their positions, as the layer turns its keys and queries."""
        return self._turned(x, *self._angles(x, positions, layer_idx), layer_idx)

    def unrotate(
        self, x: Float[Tensor, "*lead tokens head_dim"], positions: Int[Tensor, "*batch tokens"], layer_idx: int
    ) -> Float[Tensor, "*lead tokens head_dim"]:
        """Return vectors as they were before the layer turned them: ``rotate`` undone, its factor included.

        A key goes from one position to another by ``rotate(unrotate(key, here), there)``.
        """
        cos, sin = self._angles(x, positions, layer_idx)
        squared = cos.square() + sin.square()  # 1, or the square of the factor (yarn's)
        return self._turned(x, cos / squared, -sin / squared, layer_idx)

    def averaged(
        self, x: Float[Tensor, "*lead head_dim"], start: int, count: int, layer_idx: int
    ) -> Float[Tensor, "*lead head_dim"]:
        """Return the mean of vectors turned by each of the positions ``start`` to ``start + count - 1``."""
        positions = torch.arange(start, start + count, device=x.device)
        cos, sin = (one.mean(1, keepdim=True) for one in self._angles(x, positions, layer_idx))
        return self._turned(x[..., None, :], cos, sin, layer_idx)[..., 0, :]

    def embeddings(
        self, like: Tensor, positions: Int[Tensor, "batch tokens"], layer_idx: int
    ) -> tuple[Float[Tensor, "_batch tokens rotary"], Float[Tensor, "_batch tokens rotary"]]:
        """Return cosines and sines as the decoder hands them to the layer.

        Args:
            like: Gives dtype and device.
            positions: Of each token.
            layer_idx: A layer without RoPE gets ones and zeros, which turn nothing.
        """
        return self.layers[layer_idx].angles(like, positions.long())

    def _angles(self, x: Tensor, positions: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        batched = positions if positions.ndim == 2 else positions[None]
        return self.embeddings(x.new_empty(0, dtype=_wide(x)), batched, layer_idx)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor, layer_idx: int) -> Tensor:
        batch = cos.shape[0]
        flat = x.to(_wide(x)).reshape(batch, math.prod(x.shape[:-2]) // batch, *x.shape[-2:])
        return self.layers[layer_idx].turn(flat, cos, sin).reshape(x.shape).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
