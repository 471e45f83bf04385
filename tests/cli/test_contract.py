"""What scripts rely on: commands, options, listings, and caches that were saved earlier.

``python tests/test_contract.py`` writes ``tests/contract`` anew, after a change that is meant.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import vestige
from tests.conftest import on_the_default_model
from vestige import Budget, KVCache, policies
from vestige.cli.main import app
from vestige.testing import random_ids, tiny

CONTRACT = Path(__file__).parent / "contract"
LISTINGS = ("models", "policies", "erasers", "memories")


def help_texts(command: Any, *words: str) -> dict[str, str]:
    """Return what ``--help`` prints, of a command and those below it, but for line breaks and how types are drawn."""
    printed = CliRunner().invoke(app, [*words, "--help"]).stdout
    found = {" ".join(words): " ".join(re.sub(r"<[^>]+>|\b(TEXT|PATH|INTEGER|FLOAT)\b", " ", printed).split())}
    for name, inner in getattr(command, "commands", {}).items():
        found |= help_texts(inner, *words, name)
    return found


def listing(name: str) -> Any:
    """Return what ``vestige NAME --json`` prints."""
    printed = CliRunner().invoke(app, [name, "--json"]).stdout
    return json.loads(printed.splitlines()[-1])


def read(name: str) -> Any:
    return json.loads((CONTRACT / name).read_text())


def test_commands_and_their_options_are_as_they_were():
    assert help_texts(typer.main.get_command(app)) == read("help.json")


@pytest.mark.parametrize("name", LISTINGS)
def test_a_listing_is_as_it_was(name):
    assert listing(name) == read("listings.json")[name]


def test_public_names_are_as_they_were():
    assert sorted(vestige.__all__) == read("names.json")


@pytest.mark.slow
@on_the_default_model
def test_the_demo_answers_as_it_did():
    printed = json.loads(CliRunner().invoke(app, ["demo", "--json"]).stdout.splitlines()[-1])
    expected = read("demo.json")
    assert sorted(printed) == expected.pop("keys")
    assert {name: printed[name] for name in expected} == expected


@torch.no_grad()
def test_a_cache_saved_in_format_7_loads_and_goes_on_as_it_did():
    saved = CONTRACT / "format7"
    model = AutoModelForCausalLM.from_pretrained(saved / "model", dtype=torch.float32)
    expected = load_file(saved / "expected.safetensors")
    cache = KVCache.load(saved / "cache", model)
    assert (cache.seen, cache.held) == ((40,), int(expected["held"]))
    assert layers_of(cache) == json.loads((saved / "layers.json").read_text())
    with vestige.attach(model):
        logits = model(expected["ids"], **vestige_cache(cache)).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)


def layers_of(cache: KVCache) -> Any:
    return json.loads(json.dumps(cache.report().as_dict()["layers"]))


def vestige_cache(cache: KVCache) -> dict[str, Any]:
    from vestige.models.compat import cache_argument

    return cache_argument(cache)


@torch.no_grad()
def write_saved_cache(folder: Path) -> None:
    """Write a tiny model, a cache of it that evicted, remembers and observes, and how it goes on."""
    model = tiny("llama", seed=1)
    model.save_pretrained(folder / "model")
    policy = policies.SnapKV(budget=Budget.tokens(16), sink=2, window=4, observed=4)
    cache = KVCache(model, policy, memory=vestige.memory.make("moments"))
    ids = random_ids(model, 1, 43, seed=2)
    with vestige.attach(model):
        vestige.prefill(model, ids[:, :40], cache, chunk=16)
        cache.save(folder / "cache")
        held, layers = cache.held, layers_of(cache)
        logits = model(ids[:, 40:], **vestige_cache(cache)).logits
    expected = {"ids": ids[:, 40:].contiguous(), "logits": logits.contiguous(), "held": torch.tensor(held)}
    save_file(expected, folder / "expected.safetensors")
    (folder / "layers.json").write_text(json.dumps(layers) + "\n")


def write(name: str, value: Any) -> None:
    (CONTRACT / name).write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    write("help.json", help_texts(typer.main.get_command(app)))
    write("listings.json", {name: listing(name) for name in LISTINGS})
    write("names.json", sorted(vestige.__all__))
    if not (CONTRACT / "format7").exists():  # the point of it is that it is old
        write_saved_cache(CONTRACT / "format7")
