"""Eviction policies: one file each, and a dict of their names.

A new policy is its file, one line in ``POLICIES`` and one golden test. ``POLICIES`` holds paths of classes instead of
classes, so that listing is cheap. A policy of your own need not be registered: pass the object.
"""

import dataclasses
from typing import Any

from vestige.budget import Budget
from vestige.errors import PolicyError
from vestige.policies.base import Policy
from vestige.policies.selection import parse_share
from vestige.utils.registry import Registry

POLICIES: dict[str, str] = {
    "adakv": "vestige.policies.adakv:AdaKV",
    "compactor": "vestige.policies.compactor:Compactor",
    "criticalkv": "vestige.policies.criticalkv:CriticalKV",
    "duo_attention": "vestige.policies.duo_attention:DuoAttention",
    "expected_attention": "vestige.policies.expected_attention:ExpectedAttention",
    "full": "vestige.policies.full:Full",
    "h2o": "vestige.policies.h2o:H2O",
    "indexmem": "vestige.policies.indexmem:IndexMem",
    "keydiff": "vestige.policies.keydiff:KeyDiff",
    "knorm": "vestige.policies.knorm:KNorm",
    "kvzip": "vestige.policies.kvzip:KVzip",
    "lagkv": "vestige.policies.lagkv:LagKV",
    "laprox": "vestige.policies.laprox:LaProx",
    "pyramidkv": "vestige.policies.pyramidkv:PyramidKV",
    "r_kv": "vestige.policies.r_kv:RKV",
    "random": "vestige.policies.random:Random",
    "retention": "vestige.policies.retention:Retention",
    "snapkv": "vestige.policies.snapkv:SnapKV",
    "streaming_llm": "vestige.policies.streaming_llm:StreamingLLM",
    "tova": "vestige.policies.tova:TOVA",
    "xkv": "vestige.policies.xkv:XKV",
}

_ADAPTER = [f"vestige.policies.kvpress:{name}" for name in ("FromKVPress", "from_kvpress")]
_REGISTRY = Registry[type[Policy], Policy]("policy", POLICIES, PolicyError, __name__, unnamed=_ADAPTER)
resolve, name_of, __getattr__ = _REGISTRY.resolve, _REGISTRY.name_of, _REGISTRY.attribute
__all__ = ["POLICIES", "make", "name_of", "resolve", *sorted(_REGISTRY.members)]  # pyright: ignore[reportUnsupportedDunderAll]


def make(name: str, budget: Budget | None = None, *, share: str | None = None, seed: int = 0) -> Policy:
    """Return a named policy as the command line makes it: with its defaults, but for the options in the name.

    Args:
        name: A key of ``POLICIES``, with options if wanted: ``"snapkv(kernel=7)"``.
        budget: Budget of the cache; every policy but "full" needs one.
        share: Rows that compete for pairs: "head", "layer" or "model"; None leaves the method's own choice.
        seed: Seed of policies that draw.

    Raises:
        PolicyError: An unknown name, option or share, or no budget where one is needed.
    """
    name, cls, options = _REGISTRY.parse(name, given=("budget",))
    if budget is None and name != "full" and options.get("threshold") is None:
        raise PolicyError(f"policy {name!r} needs a budget: tokens (512), a fraction (0.1) or bytes (64MB)")
    fields = {field.name for field in dataclasses.fields(cls)}
    given: dict[str, Any] = {} if share is None else {"share": parse_share(share)}
    given |= {"seed": seed} if "seed" in fields else {}
    return cls(budget=budget, **(given | options))
