"""Record the hidden states that enter a model's layers, which are the input of the gates."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from vestige.models.layout import attention_input, check


@contextmanager
def record_hidden_states(model: PreTrainedModel) -> Iterator[dict[int, Float[Tensor, "batch new hidden"]]]:
    """Record the input of each evictable layer's attention in the first forward pass."""
    states: dict[int, Tensor] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer_idx: Any = module.layer_idx
        states.setdefault(layer_idx, attention_input(args, kwargs))

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in check(model).attentions.values()]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
