"""Keep the KV cache of long-context language models small and truthful.

>>> cache = vestige.KVCache(model, policies.SnapKV(budget=Budget.tokens(1024)))
>>> with vestige.attach(model):
...     out = model.generate(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24

Names are loaded on first use, so that ``import vestige`` and ``vestige --help`` are quick. No submodule may have the
name of a function listed here: its import would replace the function.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vestige.utils.version import __version__ as __version__

if TYPE_CHECKING:
    from vestige import erasers as erasers
    from vestige import memory as memory
    from vestige import policies as policies
    from vestige.budget import Budget as Budget
    from vestige.cache.attach import Attachment as Attachment
    from vestige.cache.attach import attach as attach
    from vestige.cache.attach import detach as detach
    from vestige.cache.kv_cache import KVCache as KVCache
    from vestige.cache.prefill import prefill as prefill
    from vestige.cache.report import Report as Report
    from vestige.erasers.base import Erased as Erased
    from vestige.erasers.base import Eraser as Eraser
    from vestige.erasers.erase import erase as erase
    from vestige.erasers.forget import forget as forget
    from vestige.errors import BudgetError as BudgetError
    from vestige.errors import CacheError as CacheError
    from vestige.errors import CacheFileError as CacheFileError
    from vestige.errors import InputError as InputError
    from vestige.errors import ModelError as ModelError
    from vestige.errors import PolicyError as PolicyError
    from vestige.errors import VestigeError as VestigeError
    from vestige.models.layout import check as check
    from vestige.models.loading import load as load
    from vestige.pipelines.session import Session as Session
    from vestige.policies.base import Policy as Policy
    from vestige.policies.observation import Observation as Observation
    from vestige.policies.observation import Phase as Phase
    from vestige.spans import Span as Span


_HOME = {
    "Attachment": "vestige.cache.attach",
    "Budget": "vestige.budget",
    "BudgetError": "vestige.errors",
    "CacheError": "vestige.errors",
    "CacheFileError": "vestige.errors",
    "Erased": "vestige.erasers.base",
    "Eraser": "vestige.erasers.base",
    "InputError": "vestige.errors",
    "KVCache": "vestige.cache.kv_cache",
    "ModelError": "vestige.errors",
    "Observation": "vestige.policies.observation",
    "Phase": "vestige.policies.observation",
    "Policy": "vestige.policies.base",
    "PolicyError": "vestige.errors",
    "Report": "vestige.cache.report",
    "Session": "vestige.pipelines.session",
    "Span": "vestige.spans",
    "VestigeError": "vestige.errors",
    "attach": "vestige.cache.attach",
    "check": "vestige.models.layout",
    "detach": "vestige.cache.attach",
    "erase": "vestige.erasers.erase",
    "erasers": "vestige.erasers",
    "forget": "vestige.erasers.forget",
    "load": "vestige.models.loading",
    "memory": "vestige.memory",
    "policies": "vestige.policies",
    "prefill": "vestige.cache.prefill",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vestige' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    return module if name in ("erasers", "memory", "policies") else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
