"""Eviction methods, one file each, named in one dict.

A new policy is its file, one line in ``POLICIES`` and one golden test. ``POLICIES`` names classes rather than holding
them, so that listing is cheap; an own policy need not be registered: pass the object.
"""

import dataclasses
from typing import Any

from vestige.budget import Budget
from vestige.errors import PolicyError
from vestige.policies.base import Policy
from vestige.policies.selection import parse_share
from vestige.utils import options as called
from vestige.utils import registry

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

_ADAPTER = [f"vestige.policies.kvpress:{name}" for name in ("FromKVPress", "from_kvpress")]  # has no name of its own
_CLASSES = registry.members([*POLICIES.values(), *_ADAPTER])
__all__ = ["POLICIES", "make", "name_of", "resolve", *sorted(_CLASSES)]  # pyright: ignore[reportUnsupportedDunderAll]


def resolve(name: str) -> type[Policy]:
    """Return the class of a named policy.

    Raises:
        PolicyError: No such name; the message gives the nearest and all valid ones.
    """
    found: type[Policy] = registry.resolve(name, POLICIES, "policy", PolicyError)
    return found


def make(name: str, budget: Budget | None = None, *, share: str | None = None, seed: int = 0) -> Policy:
    """Return a named policy, as the command line makes it: with its defaults but for the options in the name.

    Args:
        name: A key of ``POLICIES``, with options if wanted: ``"snapkv(kernel=7)"``.
        budget: What it may keep; every policy but "full" needs one.
        share: Who competes for room; None leaves the method's own choice.
        seed: For policies that draw.

    Raises:
        PolicyError: An unknown name, option or share, or no budget where one is needed.
    """
    name, options = called.parse_options(name, "policy", PolicyError)
    cls: Any = resolve(name)
    options = called.coerce_options(options, cls, name, "policy", PolicyError, taken=("budget",))
    if budget is None and name != "full" and options.get("threshold") is None:
        raise PolicyError(f"policy {name!r} needs a budget: tokens (512), a fraction (0.1) or bytes (64MB)")
    fields = {field.name for field in dataclasses.fields(cls)}
    given: dict[str, Any] = {} if share is None else {"share": parse_share(share)}
    given |= {"seed": seed} if "seed" in fields else {}
    policy: Policy = cls(budget=budget, **(given | options))
    return policy


def name_of(policy: Policy) -> str:
    """Return the name under which a policy is listed, or its class name."""
    return registry.name_of(policy, POLICIES)


def __getattr__(name: str) -> Any:
    return registry.member(name, _CLASSES, __name__)
