"""The attention function that transformers calls on an attached model.

``Cache.update`` returns a :class:`KVHandle` instead of keys and values. The function resolves it to the layer's
storage, which computes attention. Tensors (of another cache, a sliding layer, a vision tower) get plain attention.
"""

from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vestige.errors import CacheError
from vestige.kernels import AttentionScale, reference

NAME = "vestige"
"""The name under which the attention function and its mask are registered."""


@runtime_checkable
class AttentionSource(Protocol):
    """Storage that queries can attend to."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        mask: Tensor | None,
        scale: AttentionScale,
        position_bias: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Return attention over the stored pairs, ``batch new heads value_dim``.

        Args:
            module: The attention module.
            query: ``batch heads new head_dim``, after RoPE.
            mask: Mask made by transformers; storage with evicted pairs masks by position instead.
            scale: Scale of the module's attention.
            position_bias: Added to the logits, or None.
            options: Further keyword arguments of transformers' attention functions.
        """


class KVHandle:
    """Placeholder that ``Cache.update`` returns; the attention function resolves it to the layer's storage.

    It is not a tensor. A model that transforms keys after storing them would be silently wrong on a ragged layer; the
    handle makes it raise at once.
    """

    def __init__(self, source: AttentionSource, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.source = source
        self.shape = shape
        self.dtype = dtype
        self.device = device

    def to(self, device: torch.device) -> "KVHandle":
        """Return the handle itself: models with KV sharing move pairs to the query's device, which must be the same."""
        if torch.device(device) != self.device:
            self._refuse(f"moving them from {self.device} to {device}")
        return self

    def _refuse(self, what: str) -> NoReturn:
        raise CacheError(
            f"this model uses cached keys or values itself ({what}) between storing and attending to them, which an "
            "evicting cache cannot allow; check it with vestige.check(model), or use a DynamicCache"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f".{name}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        flat = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
        handle = next(x for x in [*flat, *(kwargs or {}).values()] if isinstance(x, cls))
        handle._refuse(getattr(func, "__name__", "a torch function"))

    def _operator(self, *operands: Any) -> NoReturn:
        self._refuse("indexing or arithmetic")

    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _operator
    __matmul__ = __rmatmul__ = __neg__ = _operator


def vestige_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over a layer's pairs. Signature and result, ``batch new heads value_dim``, are those of transformers."""
    scale = AttentionScale(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    if isinstance(key, KVHandle):
        return key.source.attend(module, query, attention_mask, scale, position_bias, kwargs), None
    return attend_dense(module, query, key, value, attention_mask, scale, position_bias, kwargs), None


def attend_dense(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: AttentionScale,
    position_bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Attend over tensors by sdpa, bit for bit, or by the explicit formula where sdpa would refuse or drop a term."""
    if scale.softcap is None and scale.sinks is None and position_bias is None:
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=scale.scaling, **options)[0]
    causal = options.get("is_causal")
    if mask is None and query.shape[2] > 1 and (getattr(module, "is_causal", True) if causal is None else causal):
        mask = reference.lower_right(query.shape[2], keys.shape[2], query.device)
    if position_bias is not None and mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else torch.zeros_like(mask, dtype=torch.bool)
        additive = torch.zeros((), dtype=query.dtype) if mask.dtype == torch.bool else mask
        mask = (position_bias + additive).masked_fill(hidden, torch.finfo(query.dtype).min)
    elif position_bias is not None:
        mask = position_bias
    return reference.written_out(query, keys, values, mask, scale).transpose(1, 2).contiguous()
