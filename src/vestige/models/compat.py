"""The name of a model's cache in transformers: ``cache`` from 5.24 on, ``past_key_values`` before."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

OLD_NAME: Final = "past_key_values"
CACHE_NAME: Final = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else OLD_NAME
"""The argument of ``forward`` and ``generate`` and the field of their output that hold the cache."""


def cache_argument(cache: Cache) -> dict[str, Any]:
    """Return the cache as a keyword argument, under the name that the installed transformers prefers."""
    return {CACHE_NAME: cache}


def cache_passed(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a forward; a caller may use the old name with any transformers."""
    cache = kwargs.get(CACHE_NAME)
    return kwargs.get(OLD_NAME) if cache is None else cache
