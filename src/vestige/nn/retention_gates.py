"""Retention gates: what a pair is worth, as a number between 0 and 1, from the hidden state that made it.

A small network per layer, and a last projection that all layers share, so that its numbers can be compared over the
whole model. Gates belong to one model; they are kept beside it, never put into it.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from vestige.errors import InputError
from vestige.models.anatomy import check
from vestige.nn import io

NAME = "gates"
"""Of the files."""


@dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """The shape of gates, and whose they are.

    Args:
        layers: Indices of the model's evictable layers.
        kv_heads: Of each of them.
        hidden: Size of what enters a layer.
        width: Of the network's inner layers.
        depth: How many of these there are.
        tied: Whether all layers share the last projection.
        bias: What the last projection's bias begins with: the larger, the longer everything is kept at first.
        base: Fingerprint of the model.
        model: Its name, for messages.

    Raises:
        InputError: A number out of range.
    """

    layers: tuple[int, ...]
    kv_heads: tuple[int, ...]
    hidden: int
    width: int = 128
    depth: int = 2
    tied: bool = True
    bias: float = 6.0
    base: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.kv_heads) or not self.layers:
            raise InputError("gates need layers, and the KV heads of each")
        if min(self.hidden, self.width, self.depth, *self.kv_heads) < 1:
            raise InputError("hidden, width, depth and kv_heads must be at least 1")


class Gates(nn.Module):
    """From what enters attention to the log of each pair's retention.

    ``log beta = logsigmoid(head(body_l(x)))``: ``body_l`` is ``depth`` linear layers with SiLU, each layer l has its
    own, in whatever dtype it was put; ``head`` has one row for each KV head, is shared by all layers if ``tied``, and
    works in float32.

    Source: DBTrimKV, arXiv 2605.09649 (two inner layers, the tied head); TRIM-KV, arXiv 2512.03324.
    """

    def __init__(self, config: GatesConfig) -> None:
        super().__init__()
        self.config = config
        sizes = [config.hidden] + [config.width] * config.depth
        self.bodies = nn.ModuleList(_body(sizes) for _ in config.layers)
        heads = [nn.Linear(config.width, n) for n in ([max(config.kv_heads)] if config.tied else config.kv_heads)]
        self.heads = nn.ModuleList(heads)
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        for head in heads:
            nn.init.constant_(head.bias, config.bias)
        self._place = {layer_idx: i for i, layer_idx in enumerate(config.layers)}

    @staticmethod
    def fresh(
        model: PreTrainedModel, *, width: int = 128, depth: int = 2, tied: bool = True, bias: float = 6.0
    ) -> "Gates":
        """Return untrained gates for a model, in float32.

        Raises:
            ModelError: The model has no evictable layers.
            InputError: A number out of range.
        """
        anatomy = check(model)
        config = GatesConfig(
            layers=anatomy.evictable,
            kv_heads=tuple(anatomy.kv_heads(i) for i in anatomy.evictable),
            hidden=anatomy.config.hidden_size,
            width=width,
            depth=depth,
            tied=tied,
            bias=bias,
            **io.ownership(model),
        )
        return Gates(config).to(model.device)

    def forward(self, layer_idx: int, hidden: Float[Tensor, "batch new hidden"]) -> Float[Tensor, "batch kv_heads new"]:
        """Return log beta of the pairs that a layer makes of these states; 0 keeps forever, float32."""
        place = self._place[layer_idx]
        body: Any = self.bodies[place]
        inner = body(hidden.to(body[0].weight.dtype)).float()
        head: Any = self.heads[0 if self.config.tied else place]
        rows = self.config.kv_heads[place]
        logits = nn.functional.linear(inner, head.weight[:rows].float(), head.bias[:rows].float())
        return logsigmoid(logits).transpose(1, 2)

    def require_fit(self, model: PreTrainedModel) -> None:
        """Raise a ModelError unless these gates were made for this model."""
        io.require_fit(self.config, model, "retention gates")

    def for_inference(self, dtype: torch.dtype) -> "Gates":
        """Return gates that compute in a dtype, but for the head, and take no gradients."""
        made = Gates(self.config)
        made.load_state_dict(self.state_dict())
        made.bodies.to(dtype)
        return made.requires_grad_(False).to(next(self.parameters()).device)

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write the weights and the config into a folder."""
        io.save(self, self.config, folder, NAME, dtype=dtype)

    @staticmethod
    def load(folder: Path, model: PreTrainedModel) -> "Gates":
        """Read gates for a model, in float32; runs no code from the files.

        Raises:
            ModelError: Missing, damaged, or made for another model.
        """
        gates = io.load(lambda shape: Gates(GatesConfig(**shape)), folder, NAME, "retention gates")
        gates.require_fit(model)
        return gates.to(model.device)


def _body(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, out in pairwise(sizes):
        layers += [nn.Linear(into, out), nn.SiLU()]
    return nn.Sequential(*layers)
