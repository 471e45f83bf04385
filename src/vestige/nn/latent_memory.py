"""The weights of trained memories: for each layer a projection of its keys, and the weight of the memory's output.

The memories themselves are :class:`vestige.memory.Linear` and :class:`vestige.memory.Slots`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid
from transformers import PreTrainedModel

from vestige.errors import InputError, unknown_name_message
from vestige.nn.per_layer import PerLayerConfig, PerLayerModule

M = TypeVar("M", bound="Latent")
Kind = Literal["linear", "slots"]
KINDS: tuple[str, ...] = get_args(Kind)
WIDTHS: Mapping[str, int] = {"linear": 32, "slots": 16}
"""Default rows of the state; at these widths both kinds take equal bytes."""
GATE, DECAY = -2.0, 4.6
"""Initial logits of gate and decay: one eighth of the output is added, 1 % of the state is lost."""


def kind_of(name: str) -> Kind:
    """Return the kind of trained memory with a name.

    Raises:
        InputError: An unknown name.
    """
    if name not in KINDS:
        raise InputError(unknown_name_message("trained memory", str(name), KINDS))
    return cast(Kind, name)


@dataclass(frozen=True, kw_only=True)
class LatentConfig(PerLayerConfig):
    """The shape of a trained memory, and the model it belongs to.

    Args:
        kind: Memory that the weights are for.
        head_dims: Size of a key in each of these layers.
        width: Size of the projection: rows of the state.
        decays: Whether older pairs count less, by a learned rate; if not, pairs can be taken out again.
        asks: Whether the gate of a linear memory depends on the query.

    Raises:
        InputError: A number out of range, or an unknown kind.
    """

    kind: Kind
    head_dims: tuple[int, ...]
    width: int
    decays: bool = False
    asks: bool = False

    def __post_init__(self) -> None:
        kind_of(self.kind)
        if not self.layers or len(self.layers) != len(self.head_dims):
            raise InputError("a trained memory needs layers, and the head size of each")
        if min(self.width, *self.head_dims) < 1:
            raise InputError("width and head_dims must be at least 1")


class LayerLatent(nn.Module):
    """The weights of one layer, shared by its KV heads."""

    def __init__(self, config: LatentConfig, place: int) -> None:
        super().__init__()
        size, adds = config.head_dims[place], config.kind == "linear"
        self.phi = nn.Linear(size, config.width, bias=not adds)
        nn.init.normal_(self.phi.weight, std=size**-0.5)
        self.decay = nn.Parameter(torch.tensor(DECAY)) if config.decays else None
        self.gate = nn.Parameter(torch.tensor(GATE)) if adds else None
        self.asking = nn.Parameter(torch.zeros(size)) if adds and config.asks else None
        self.reading = None if adds else nn.Parameter(torch.tensor([1.0, 0.0]))
        """For slots: a factor on the products of queries and slots, and a term of their log weight."""

    def project(self, x: Float[Tensor, "*some head_dim"]) -> Float[Tensor, "*some width"]:
        """Return the projection of keys or queries after RoPE."""
        projected: Tensor = self.phi(x)
        return projected

    def gate_value(self, queries: Float[Tensor, "*some head_dim"]) -> Float[Tensor, "*some 1"]:
        """Return the factor, between 0 and 1, on the output of a linear memory."""
        assert self.gate is not None, "slots have no gate"
        if self.asking is None:
            return self.gate.sigmoid().expand(*queries.shape[:-1], 1)
        return (self.gate + linear(queries, self.asking[None])).sigmoid()

    def log_kept(self) -> Float[Tensor, ""] | None:
        """Return the log of the share of a pair that is left after an interval; None where nothing is lost."""
        return None if self.decay is None else logsigmoid(self.decay)


class Latent(PerLayerModule[LatentConfig]):
    """The weights of a trained memory for all evictable layers; its files have the name of its kind."""

    config_class = LatentConfig
    file_name, title = "{kind}", "{kind} memory"

    def __init__(self, config: LatentConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(LayerLatent(config, place) for place in range(len(config.layers)))

    @classmethod
    def initialize(cls: type[M], model: PreTrainedModel, **options: Any) -> M:
        """Return untrained weights for a model, as the base does; without a ``width`` they have their kind's."""
        if options.get("width") is None:
            options["width"] = WIDTHS[options["kind"]]
        return super().initialize(model, **options)

    def at(self, layer_idx: int) -> LayerLatent:
        """Return the weights of a layer."""
        found = self.layers[self._place[layer_idx]]
        assert isinstance(found, LayerLatent)
        return found
