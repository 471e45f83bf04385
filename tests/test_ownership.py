"""Only the package ``vestige.cache`` assigns to attributes of a cache, its state and its layers."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vestige
from vestige import KVCache, attach, policies, prefill
from vestige.testing import random_ids, tiny

SOURCE = Path(vestige.__file__).parent
OWNER = SOURCE / "cache"
PEERS = SOURCE / "bench" / "methods" / "peers"  # work on caches of other libraries
NAMES = {"cache", "caches", "copy", "fork", "joined", "twin", "state", "states", "layer", "layers", "evictable"}
"""Names under which code outside the package refers to a cache, a state, or layers."""


@pytest.fixture(scope="module")
def attributes() -> set[str]:
    """The data attributes of a cache that has read something, of its state and of its evictable layers."""
    model = tiny("llama")
    cache = KVCache(model, policies.Full())
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 8), cache)
    state = cache.state
    owners = (cache, state, state.schedule, state.history, state.absorbed, cache.evictable[0])
    return {name for owner in owners for name in vars(owner)}


def find_assigned(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield every expression that some statement assigns to or deletes, tuples taken apart, ``setattr`` included."""
    for node in ast.walk(tree):
        if isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
            yield node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            yield ast.Attribute(node.args[0], getattr(node.args[1], "value", "*"))


def split_chain(node: ast.expr) -> list[str]:
    """Return the names of ``a.b[i].c()``: a, b, c."""
    names: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        node = node.func if isinstance(node, ast.Call) else node.value
    return [*([node.id] if isinstance(node, ast.Name) else []), *reversed(names)]


def find_intrusions(source: str, attributes: set[str]) -> list[str]:
    """Return the assignments to one of these attributes, or to its items, of what carries one of ``NAMES``."""
    chains = map(split_chain, find_assigned(ast.parse(source)))
    return [
        ".".join(chain)
        for chain in chains
        if chain and chain[-1] in attributes | {"*"} and not NAMES.isdisjoint(chain[:-1])
    ]


def test_only_the_cache_package_writes_to_a_cache(attributes):
    files = [file for file in SOURCE.rglob("*.py") if not {OWNER, PEERS} & set(file.parents)]
    assert len(files) > 100
    found = {str(file.relative_to(SOURCE)): find_intrusions(file.read_text(), attributes) for file in files}
    assert not {file: intrusions for file, intrusions in found.items() if intrusions}


@pytest.mark.parametrize(
    "statement",
    [
        "cache.state.pins = ()",
        "twin.state.seen += (1,)",
        "self.cache.state.schedule.prompt, x = 1, 2",
        "cache.evictable[0].columns['keys'][:, 0] = 0",
        "layer.remains: object = None",
        "for layer.hidden in []: pass",
        "with x as cache.state: pass",
        "del state.step",
        "setattr(cache.state, name, 1)",
    ],
)
def test_an_assignment_is_found_in_every_form(statement, attributes):
    assert find_intrusions(statement, attributes)


@pytest.mark.parametrize(
    "statement", ["cache = 1", "session.cache = cache", "optimizer.state[p] = {}", "x = cache.seen"]
)
def test_assignments_to_other_things_are_allowed(statement, attributes):
    assert not find_intrusions(statement, attributes)
