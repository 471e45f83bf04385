"""Retention gates: the worth of a KV pair, a number between 0 and 1, from the hidden state that made it.

Each layer has a small network. All layers share the last projection, so that worth can be compared over the whole
model.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from vestige.errors import InputError
from vestige.nn.per_layer import PerLayerConfig, PerLayerModule


@dataclass(frozen=True, kw_only=True)
class GatesConfig(PerLayerConfig):
    """The shape of gates, and the model they belong to.

    Args:
        kv_heads: KV heads of each of these layers.
        hidden: Size of a layer's input.
        width: Size of the network's inner layers.
        depth: Number of inner layers.
        tied: Whether all layers share the last projection.
        bias: Initial bias of the last projection; the larger, the longer everything is kept at first.

    Raises:
        InputError: A number out of range.
    """

    kv_heads: tuple[int, ...]
    hidden: int
    width: int = 128
    depth: int = 2
    tied: bool = True
    bias: float = 6.0

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.kv_heads) or not self.layers:
            raise InputError("gates need layers, and the KV heads of each")
        if min(self.hidden, self.width, self.depth, *self.kv_heads) < 1:
            raise InputError("hidden, width, depth and kv_heads must be at least 1")


class Gates(PerLayerModule[GatesConfig]):
    """Networks from the input of attention to the log of each pair's retention.

    ``log beta = logsigmoid(head(body_l(x)))``: ``body_l`` is ``depth`` linear layers with SiLU, one body for each layer
    l, in any dtype; ``head`` has one row for each KV head, is shared by all layers if ``tied``, and computes in
    float32.

    Source: DBTrimKV, arXiv 2605.09649 (two inner layers, the tied head); TRIM-KV, arXiv 2512.03324.
    """

    config_class = GatesConfig
    file_name, title = "gates", "retention gates"
    frozen: ClassVar[bool] = False

    def __init__(self, config: GatesConfig) -> None:
        super().__init__(config)
        sizes = [config.hidden] + [config.width] * config.depth
        self.bodies = nn.ModuleList(_make_body(sizes) for _ in config.layers)
        heads = [nn.Linear(config.width, n) for n in ([max(config.kv_heads)] if config.tied else config.kv_heads)]
        self.heads = nn.ModuleList(heads)
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        for head in heads:
            nn.init.constant_(head.bias, config.bias)

    def forward(self, layer_idx: int, hidden: Float[Tensor, "batch new hidden"]) -> Float[Tensor, "batch kv_heads new"]:
        """Return log beta, in float32, of the pairs that a layer makes of hidden states; 0 keeps a pair forever."""
        place = self._place[layer_idx]
        body: Any = self.bodies[place]
        inner = body(hidden.to(body[0].weight.dtype)).float()
        head: Any = self.heads[0 if self.config.tied else place]
        rows = self.config.kv_heads[place]
        logits = nn.functional.linear(inner, head.weight[:rows].float(), head.bias[:rows].float())
        return logsigmoid(logits).transpose(1, 2)

    def for_inference(self, dtype: torch.dtype) -> "Gates":
        """Return a copy that computes in a dtype, except for the head, and takes no gradients."""
        made = Gates(self.config)
        made.load_state_dict(self.state_dict())
        made.bodies.to(dtype)
        return made.requires_grad_(False).to(next(self.parameters()).device)


def _make_body(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers)
