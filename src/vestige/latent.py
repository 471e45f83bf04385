"""What IndexMem's latent memory is made with: a projection of keys and queries for each layer, and how much it counts.

Belongs to one model; kept beside it, never put into it. The memory itself is :class:`vestige.memory.Linear`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from vestige import trained
from vestige.errors import InputError, unknown
from vestige.models import check

NAME = "latent"
"""Of the files."""
Fusion = Literal["added", "merged"]
FUSIONS: tuple[str, ...] = get_args(Fusion)
GATE, DECAY = -2.0, 4.6
"""Logits that gate and decay begin with: an eighth is added, a hundredth is lost."""


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """The shape of a latent memory, and whose it is.

    Args:
        layers: Indices of the model's evictable layers.
        head_dims: Size of a key of each of them.
        width: Of the projection: rows of the state.
        fusion: What is read is added to attention, by a gate, as in the paper; or merged with it by how much the
            evicted pairs would weigh.
        decays: Whether older pairs count less, by a rate that is learned; if not, pairs can be subtracted again.
        asks: Whether the gate looks at the query.
        base: Fingerprint of the model.
        model: Its name, for messages.

    Raises:
        InputError: A number out of range, or an unknown fusion.
    """

    layers: tuple[int, ...]
    head_dims: tuple[int, ...]
    width: int = 32
    fusion: Fusion = "added"
    decays: bool = False
    asks: bool = False
    base: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.head_dims):
            raise InputError("a latent memory needs layers, and the head size of each")
        if min(self.width, *self.head_dims) < 1:
            raise InputError("width and head_dims must be at least 1")
        fusion_of(self.fusion)


def fusion_of(name: str) -> Fusion:
    """Return the fusion of that name.

    Raises:
        InputError: There is none.
    """
    if name not in FUSIONS:
        raise InputError(unknown("fusion", str(name), FUSIONS))
    return cast(Fusion, name)


class LayerLatent(nn.Module):
    """One layer's part, shared by its KV heads."""

    def __init__(self, config: LatentConfig, place: int) -> None:
        super().__init__()
        size = config.head_dims[place]
        self.phi = nn.Linear(size, config.width, bias=False)
        nn.init.normal_(self.phi.weight, std=size**-0.5)
        self.decay = nn.Parameter(torch.tensor(DECAY)) if config.decays else None
        added = config.fusion == "added"
        self.gate = nn.Parameter(torch.tensor(GATE)) if added else None
        self.asking = nn.Parameter(torch.zeros(size)) if added and config.asks else None
        self.mass = None if added else nn.Parameter(torch.tensor([1.0, 0.0]))
        """Of the log of the weight of the evicted pairs: a factor on what their mean key gives, and an offset."""

    def project(self, x: Float[Tensor, "*some head_dim"]) -> Float[Tensor, "*some width"]:
        """Return keys or queries, after RoPE, as the memory sees them."""
        projected: Tensor = self.phi(x)
        return projected

    def open(self, queries: Float[Tensor, "*some head_dim"]) -> Float[Tensor, "*some 1"]:
        """Return by how much what is read is added, between 0 and 1."""
        assert self.gate is not None, "what is merged has no gate"
        logit = self.gate if self.asking is None else self.gate + queries @ self.asking
        return logit.sigmoid().expand(queries.shape[:-1])[..., None]

    def log_kept(self) -> Float[Tensor, ""] | None:
        """Return the log of what is left of a pair after ``INTERVAL`` tokens; None where nothing is lost."""
        return None if self.decay is None else logsigmoid(self.decay)


class Latent(nn.Module):
    """The projections, gates and rates of all evictable layers.

    Source: IndexMem, arXiv 2605.25475, after its authors' code: one projection for keys and queries, after RoPE; one
    scalar gate and one decay for each layer. The rate of writing, which cancels in what is read, is left out. Ours: the
    decay is by tokens between pairs, not by writes, so that nothing hangs on when pairs were evicted.
    """

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(LayerLatent(config, place) for place in range(len(config.layers)))
        self._place = {layer_idx: place for place, layer_idx in enumerate(config.layers)}

    @staticmethod
    def fresh(
        model: PreTrainedModel, *, width: int = 32, fusion: Fusion = "added", decays: bool = False, asks: bool = False
    ) -> "Latent":
        """Return an untrained one for a model, in float32.

        Raises:
            ModelError: The model has no evictable layers.
            InputError: A number out of range.
        """
        anatomy = check(model)
        config = LatentConfig(
            layers=anatomy.evictable,
            head_dims=tuple(anatomy.head_dim(i) for i in anatomy.evictable),
            width=width,
            fusion=fusion,
            decays=decays,
            asks=asks,
            base=anatomy.fingerprint(),
            model=model.config.name_or_path or "",
        )
        return Latent(config).to(model.device)

    def at(self, layer_idx: int) -> LayerLatent:
        """Return a layer's part."""
        found = self.layers[self._place[layer_idx]]
        assert isinstance(found, LayerLatent)
        return found

    def require_fit(self, model: PreTrainedModel) -> None:
        """Raise a ModelError unless this was made for a model."""
        trained.require_fit(self.config, model, "latent memory")

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write the weights and the config into a folder."""
        trained.save(self, self.config, folder, NAME, dtype=dtype)

    @staticmethod
    def load(folder: Path, model: PreTrainedModel) -> "Latent":
        """Read one for a model, in float32, without gradients; runs no code from the files.

        Raises:
            ModelError: Missing, damaged, or made for another model.
        """
        latent = trained.load(_made, folder, NAME, "latent memory")
        latent.require_fit(model)
        return latent.requires_grad_(False).to(model.device)


def _made(shape: Mapping[str, Any]) -> Latent:
    lists = {name: tuple(shape[name]) for name in ("layers", "head_dims")}
    return Latent(LatentConfig(**{**shape, **lists}))
