"""Rotary positions: rotate keys and queries by positions, undo it, and rotate by the mean over a range of positions.

Only arithmetic is here. :meth:`~vestige.models.layout.ModelLayout.rope` finds how a layer's own code makes angles and
applies them; both are used unchanged, so partial, interleaved and scaled rotations need no code here.
A rotation is linear in the vector and in its (cosine, sine), which gives two more operations. With cosine and sine
divided by the square of their length, and the sine negated, it undoes itself. With averaged cosines and sines it is the
mean rotation.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of keys and queries in one layer.

    Args:
        angles: Maps a tensor that gives dtype and device, and positions ``batch tokens``, to cosines and sines ``batch
            tokens rotary``, with the factor that some models apply. A layer without RoPE has ones and zeros.
        turn: Maps vectors ``batch heads tokens head_dim``, cosines and sines to the rotated vectors.
    """

    angles: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    turn: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotations of keys and queries in all layers of a model.

    Vectors come as ``... tokens head_dim``, positions as ``tokens`` (the same for all leading axes) or ``batch
    tokens``, where batch is the first axis of the vectors. Everything is computed in float32 or wider and returned in
    the dtype of the input; nothing is modified.
    """

    layers: Mapping[int, Rotation]
    """Rotation of each evictable layer, by layer index."""

    def rotate(
        self, x: Float[Tensor, "*lead tokens head_dim"], positions: Int[Tensor, "*batch tokens"], layer_idx: int
    ) -> Float[Tensor, "*lead tokens head_dim"]:
        """Return vectors rotated by their positions, as the layer rotates its keys and queries."""
        return self._rotate(x, *self._angles(x, positions, layer_idx), layer_idx)

    def unrotate(
        self, x: Float[Tensor, "*lead tokens head_dim"], positions: Int[Tensor, "*batch tokens"], layer_idx: int
    ) -> Float[Tensor, "*lead tokens head_dim"]:
        """Return vectors as they were before the layer rotated them: the inverse of ``rotate``, its factor included.

        A key moves from one position to another by ``rotate(unrotate(key, here), there)``.
        """
        cos, sin = self._angles(x, positions, layer_idx)
        squared = cos.square() + sin.square()  # 1, or the square of the factor (yarn's)
        return self._rotate(x, cos / squared, -sin / squared, layer_idx)

    def averaged(
        self, x: Float[Tensor, "*lead head_dim"], start: int, count: int, layer_idx: int
    ) -> Float[Tensor, "*lead head_dim"]:
        """Return the mean of vectors rotated by each of the positions ``start`` to ``start + count - 1``."""
        positions = torch.arange(start, start + count, device=x.device)
        cos, sin = (part.mean(1, keepdim=True) for part in self._angles(x, positions, layer_idx))
        return self._rotate(x[..., None, :], cos, sin, layer_idx)[..., 0, :]

    def embeddings(
        self, like: Tensor, positions: Int[Tensor, "batch tokens"], layer_idx: int
    ) -> tuple[Float[Tensor, "_batch tokens rotary"], Float[Tensor, "_batch tokens rotary"]]:
        """Return cosines and sines as the decoder passes them to the layer, in the dtype and on the device of ``like``.

        A layer without RoPE gets ones and zeros, which rotate nothing.
        """
        return self.layers[layer_idx].angles(like, positions.long())

    def _angles(self, x: Tensor, positions: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        batched = positions if positions.ndim == 2 else positions[None]
        return self.embeddings(x.new_empty(0, dtype=_widen(x)), batched, layer_idx)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor, layer_idx: int) -> Tensor:
        batch = cos.shape[0]
        flat = x.to(_widen(x)).reshape(batch, math.prod(x.shape[:-2]) // batch, *x.shape[-2:])
        return self.layers[layer_idx].turn(flat, cos, sin).reshape(x.shape).to(x.dtype)


def _widen(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
