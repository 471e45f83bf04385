"""What enters the layers of a model: all that gates look at."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from vestige.models.anatomy import attention_input, check


@contextmanager
def record_hidden_states(model: PreTrainedModel) -> Iterator[dict[int, Float[Tensor, "batch new hidden"]]]:
    """Note what enters the evictable layers in the first forward."""
    states: dict[int, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer_idx: Any = module.layer_idx
        states.setdefault(layer_idx, attention_input(args, kwargs))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in check(model).attentions.values()]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
