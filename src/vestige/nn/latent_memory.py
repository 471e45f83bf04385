"""What trained memories are made with: for each layer a projection of its keys, and how much what is read counts.

They belong to one model; they are kept beside it, never put into it. The memories themselves are
:class:`vestige.memory.Linear` and :class:`vestige.memory.Slots`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid
from transformers import PreTrainedModel

from vestige.errors import InputError, unknown_name_message
from vestige.models.anatomy import check
from vestige.nn import io

Kind = Literal["linear", "slots"]
KINDS: tuple[str, ...] = get_args(Kind)
WIDTHS: Mapping[str, int] = {"linear": 32, "slots": 16}
"""Rows of the state, by default: at these both weigh alike."""
GATE, DECAY = -2.0, 4.6
"""Logits that gate and decay begin with: an eighth is added, a hundredth is lost."""


def kind_of(name: str) -> Kind:
    """Return the kind of that name.

    Raises:
        InputError: There is none.
    """
    if name not in KINDS:
        raise InputError(unknown_name_message("trained memory", str(name), KINDS))
    return cast(Kind, name)


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """The shape of a trained memory, and whose it is.

    Args:
        kind: Which memory it is for.
        layers: Indices of the model's evictable layers.
        head_dims: Size of a key of each of them.
        width: Of the projection: rows of the state.
        decays: Whether older pairs count less, by a rate that is learned; if not, pairs can be taken out again.
        asks: Whether the gate looks at the query; of linear memories.
        base: Fingerprint of the model.
        model: Its name, for messages.

    Raises:
        InputError: A number out of range, or an unknown kind.
    """

    kind: Kind
    layers: tuple[int, ...]
    head_dims: tuple[int, ...]
    width: int
    decays: bool = False
    asks: bool = False
    base: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        kind_of(self.kind)
        if not self.layers or len(self.layers) != len(self.head_dims):
            raise InputError("a trained memory needs layers, and the head size of each")
        if min(self.width, *self.head_dims) < 1:
            raise InputError("width and head_dims must be at least 1")


class LayerLatent(nn.Module):
    """One layer's part, shared by its KV heads."""

    def __init__(self, config: LatentConfig, place: int) -> None:
        super().__init__()
        size, adds = config.head_dims[place], config.kind == "linear"
        self.phi = nn.Linear(size, config.width, bias=not adds)
        nn.init.normal_(self.phi.weight, std=size**-0.5)
        self.decay = nn.Parameter(torch.tensor(DECAY)) if config.decays else None
        self.gate = nn.Parameter(torch.tensor(GATE)) if adds else None
        self.asking = nn.Parameter(torch.zeros(size)) if adds and config.asks else None
        self.reading = None if adds else nn.Parameter(torch.tensor([1.0, 0.0]))
        """Of slots: a factor on the products of queries and slots, and what is added to their log weight."""

    def project(self, x: Float[Tensor, "*some head_dim"]) -> Float[Tensor, "*some width"]:
        """Return keys, or queries, after RoPE, as the memory sees them."""
        projected: Tensor = self.phi(x)
        return projected

    def open(self, queries: Float[Tensor, "*some head_dim"]) -> Float[Tensor, "*some 1"]:
        """Return by how much what a linear memory reads is added, between 0 and 1."""
        assert self.gate is not None, "slots have no gate"
        if self.asking is None:
            return self.gate.sigmoid().expand(*queries.shape[:-1], 1)
        return (self.gate + linear(queries, self.asking[None])).sigmoid()

    def log_kept(self) -> Float[Tensor, ""] | None:
        """Return the log of what is left of a pair after an interval; None where nothing is lost."""
        return None if self.decay is None else logsigmoid(self.decay)


class Latent(nn.Module):
    """The weights of a trained memory for all evictable layers."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(LayerLatent(config, place) for place in range(len(config.layers)))
        self._place = {layer_idx: place for place, layer_idx in enumerate(config.layers)}

    @staticmethod
    def fresh(
        model: PreTrainedModel, kind: Kind, *, width: int | None = None, decays: bool = False, asks: bool = False
    ) -> "Latent":
        """Return untrained ones for a model, in float32.

        Raises:
            ModelError: The model has no evictable layers.
            InputError: A number out of range.
        """
        anatomy = check(model)
        config = LatentConfig(
            kind=kind,
            layers=anatomy.evictable,
            head_dims=tuple(anatomy.head_dim(i) for i in anatomy.evictable),
            width=WIDTHS[kind] if width is None else width,
            decays=decays,
            asks=asks,
            **io.ownership(model),
        )
        return Latent(config).to(model.device)

    def at(self, layer_idx: int) -> LayerLatent:
        """Return a layer's part."""
        found = self.layers[self._place[layer_idx]]
        assert isinstance(found, LayerLatent)
        return found

    def require_fit(self, model: PreTrainedModel) -> None:
        """Raise a ModelError unless this was made for a model."""
        io.require_fit(self.config, model, f"{self.config.kind} memory")

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write the weights and the config into a folder, under the name of the kind."""
        io.save(self, self.config, folder, self.config.kind, dtype=dtype)

    @staticmethod
    def load(folder: Path, model: PreTrainedModel, kind: Kind) -> "Latent":
        """Read those of a kind for a model, in float32, without gradients; runs no code from the files.

        Raises:
            ModelError: Missing, damaged, or made for another model.
        """
        latent = io.load(lambda shape: Latent(LatentConfig(**shape)), folder, kind, f"{kind} memory")
        latent.require_fit(model)
        return latent.requires_grad_(False).to(model.device)
