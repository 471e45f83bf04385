"""Attaching vestige to a model: attention function and forward hooks, and restoring the model on detach."""

import weakref
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import sdpa_mask

from vestige.cache.attention import NAME, vestige_attention
from vestige.cache.kv_cache import KVCache
from vestige.cache.overlay import OverlayCache
from vestige.errors import CacheError
from vestige.models.compat import cache_passed
from vestige.models.layout import ModelLayout, attention_input, check

_attached: "weakref.WeakKeyDictionary[PreTrainedModel, Attachment]" = weakref.WeakKeyDictionary()


class Attachment:
    """A model that vestige is attached to, until the ``with`` block ends or :meth:`detach` is called."""

    def __init__(self, layout: ModelLayout) -> None:
        self.layout = layout
        self.depth = 0
        self._hooks: list[RemovableHandle] = []
        self._restore: tuple[Any, str | None] | None = None

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Undo one :func:`attach`; undoing the last one restores model and config exactly. Else it has no effect."""
        self.depth = max(self.depth - 1, 0)
        if self.depth:
            return
        for hook in self._hooks:
            hook.remove()
        if self._restore is not None:
            config, name = self._restore
            config._attn_implementation_internal = name
        self._hooks, self._restore = [], None
        _attached.pop(self.layout.model, None)

    def _install(self) -> None:
        AttentionInterface.register(NAME, vestige_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        decoder, attentions = self.layout.decoder, self.layout.attentions
        # Only the text decoder's config, which its attention modules share: a vision tower keeps its own attention.
        config: Any = decoder.config
        self._restore = config, config._attn_implementation
        config._attn_implementation_internal = NAME
        model = self.layout.model
        if model is not decoder:  # a multimodal model passes embeddings to its decoder: take the outer ids
            self._hooks.append(model.register_forward_pre_hook(_pass_ids, with_kwargs=True))
        self._hooks.append(decoder.register_forward_pre_hook(_begin_forward, with_kwargs=True))
        self._hooks += [
            module.register_forward_pre_hook(_pass_hidden, with_kwargs=True) for module in attentions.values()
        ]


def attach(model: PreTrainedModel) -> Attachment:
    """Attach vestige to a model, until the ``with`` block ends or :func:`detach` is called. Calls nest.

    A :class:`~vestige.KVCache` works only on an attached model; without a cache or with a DynamicCache an attached
    model works as before. Attaching changes the text decoder's attention name and adds hooks, but no weights.

    Raises:
        ModelError: The model cannot work with an evicting cache; the message says why.
    """
    attachment = _attached.get(model)
    if attachment is None:
        attachment = _attached[model] = Attachment(check(model))
        attachment._install()
    attachment.depth += 1
    return attachment


def detach(model: PreTrainedModel) -> None:
    """Undo one :func:`attach`; this has no effect on a model that is not attached."""
    if model in _attached:
        _attached[model].detach()


def require_cache(cache: object) -> KVCache:
    """Return the cache, or raise a CacheError if it is not a KVCache."""
    if not isinstance(cache, KVCache):
        raise CacheError(f"this takes a vestige.KVCache, got {type(cache).__name__}")
    return cache


def _begin_forward(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Begin a forward on the cache, before transformers makes masks and positions from it."""
    cache = cache_passed(kwargs)
    if cache is None or type(cache) is DynamicCache or isinstance(cache, OverlayCache):
        return
    if not isinstance(cache, KVCache):
        if isinstance(cache, Cache):
            raise CacheError(
                f"an attached model takes a vestige.KVCache or a DynamicCache, got {type(cache).__name__}; "
                "static, quantised and other caches cannot be evicted: detach the model to use them"
            )
        return
    if cache.layout.decoder is not decoder:
        raise CacheError("this cache was made for another model")
    ids = kwargs.get("input_ids", args[0] if args else None)
    inputs = kwargs.get("inputs_embeds") if ids is None else ids
    if inputs is None:
        return  # the model raises the error itself
    state = cache.state
    batch, new = inputs.shape[:2]
    outer_ids, state.outer_input_ids = state.outer_input_ids, None
    if ids is None and outer_ids is not None and outer_ids.shape == (batch, new):
        ids = outer_ids
    valid = _find_valid(kwargs.get("attention_mask"), new, cache.ragged)
    positions, checkable = _find_positions(kwargs.get("position_ids"))
    state.check_input(ids, batch, positions, valid, check=checkable)
    if state.must_settle(new):
        cache.settle(coming=new)
    state.begin(ids, batch, new, valid)


def _pass_ids(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pass the ids of the whole model's input to the cache."""
    cache = cache_passed(kwargs)
    if isinstance(cache, KVCache):
        cache.state.outer_input_ids = kwargs.get("input_ids", args[0] if args else None)


def _pass_hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pass the input of the attention module to its layer, for policies that need hidden states."""
    cache = cache_passed(kwargs)
    kv_cache = cache.cache if isinstance(cache, OverlayCache) else cache
    if isinstance(kv_cache, KVCache) and "hidden" in kv_cache.state.recording.needs:
        layer: Any = cache.layers[module.layer_idx]
        layer.hidden = attention_input(args, kwargs)


def _find_positions(position_ids: Tensor | None) -> tuple[Tensor | None, bool]:
    """Return 2-D positions, or None, and a flag: whether they count tokens.

    The image axes of mRoPE do not count tokens; a fourth, textual row does.
    """
    if position_ids is None or position_ids.ndim == 2:
        return position_ids, True
    return (position_ids[0], True) if position_ids.shape[0] == 4 else (None, False)


def _find_valid(mask: Any, new: int, ragged: bool) -> Bool[Tensor, "batch new"] | None:
    """Return True for new tokens that are not pads, by the decoder's attention mask, or None if there are no pads.

    Raises:
        CacheError: The mask is neither 2-D nor plainly causal, and after an eviction it cannot be applied.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None:
        return None
    if mask.ndim == 2:
        valid = mask[:, -new:].bool()
        return None if bool(valid.all()) else valid
    visible = mask if mask.dtype == torch.bool else mask >= 0
    visible = visible[:, 0, :, -new:]
    valid = visible[:, -1]
    causal = torch.ones(new, new, dtype=torch.bool, device=mask.device).tril()
    real = valid[:, None, :] & valid[:, :, None]
    if ragged and not bool(torch.where(real, visible == causal, True).all()):
        raise CacheError("after an eviction only causal attention is possible, but a custom mask was given")
    return None if bool(valid.all()) else valid
