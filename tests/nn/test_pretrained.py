"""Trained weights are part of what was made with them: other ones are neither served by mistake nor mixed in."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import random_gates, random_latent
from vestige import Budget, CacheFileError, InputError, KVCache, attach, memory, policies, prefill
from vestige.bench.config import BenchConfig
from vestige.bench.methods.method import Method
from vestige.bench.runner import bench
from vestige.nn import pretrained
from vestige.testing import random_ids, tiny

MODEL = tiny("llama")


def write(folder, seed: int, *, width: int = 8) -> None:
    """Write gates and a memory's weights."""
    random_gates(MODEL, seed=seed, width=width).save(folder)
    random_latent(MODEL, seed=seed).save(folder)


@torch.no_grad()
def read(folder) -> KVCache:
    """Return a cache that evicted by the folder's gates, and remembers by its memory's weights."""
    policy = policies.Retention(gates=str(folder), budget=Budget.tokens(8))
    cache = KVCache(MODEL, policy, memory=memory.Linear(latent=str(folder)))
    with attach(MODEL):
        prefill(MODEL, random_ids(MODEL, 1, 24), cache)
    return cache


def test_weights_are_told_apart_by_their_hash(tmp_path):
    write(tmp_path, 0)
    budget, gates = Budget.tokens(8), str(tmp_path)
    policy = policies.Retention(gates=gates, budget=budget)
    before = pretrained.digest(policy, MODEL)
    assert before and before == pretrained.digest(policies.Retention(gates=gates, budget=budget, horizon=4), MODEL)
    assert pretrained.digest(policies.KeyDiff(budget=Budget.tokens(64)), MODEL) == pretrained.digest(None, MODEL) == ""
    write(tmp_path, 1)
    assert pretrained.digest(policy, MODEL) != before


def test_weights_written_anew_are_read_anew_by_the_next_cache(tmp_path):
    write(tmp_path, 0)
    first = read(tmp_path).evictable[0].columns["log_beta"]
    write(tmp_path, 1, width=16)
    assert not torch.equal(read(tmp_path).evictable[0].columns["log_beta"], first)


@pytest.mark.parametrize("case", ["other gates", "gone"])
def test_a_saved_cache_is_not_gone_on_with_other_weights(case, tmp_path):
    write(tmp_path / "made", 0)
    read(tmp_path / "made").save(tmp_path / "kept")
    assert KVCache.load(tmp_path / "kept", MODEL).seen == (24,)
    if case == "gone":
        (tmp_path / "made").rename(tmp_path / "moved")
        said = "needs trained weights that cannot be had: no such folder"
    else:
        write(tmp_path / "made", 1)
        said = "was written with other trained weights"
    with pytest.raises(CacheFileError, match=said):
        KVCache.load(tmp_path / "kept", MODEL)


def one_case(folder: Path) -> BenchConfig:
    """Return a run of one sample through the full cache and the gates that lie in the folder."""
    case = {"task": "lamps", "context": "The keeper is Ada. " * 9, "question": "Who?", "answer": "Ada", "length": 90}
    (folder / "cases.jsonl").write_text(json.dumps(case | {"max_new_tokens": 2}))
    arms = (Method(policy="full", share="head"), Method(policy=f"retention(gates={folder}/made)", budget="0.5"))
    return BenchConfig(tasks=("cases",), methods=arms, cases=folder / "cases.jsonl")


def test_a_run_does_not_go_on_with_other_weights(tmp_path, chatter):
    model, tokenizer = chatter
    config = one_case(tmp_path)
    for seed, said in ((0, None), (0, None), (1, "other trained weights of retention")):
        random_gates(model, seed=seed).save(tmp_path / "made")
        if said is None:
            bench(config, model, tokenizer, name="tiny", out=tmp_path / "out", resume=True)
            continue
        with pytest.raises(InputError, match=said):
            bench(config, model, tokenizer, name="tiny", out=tmp_path / "out", resume=True)


def test_gates_of_another_model_are_a_failed_row_beside_the_others(tmp_path, chatter):
    write(tmp_path / "made", 0)
    full, other = bench(one_case(tmp_path), *chatter, name="tiny", out=tmp_path / "out")
    assert full["n"] == 1 and full["score"] is not None
    assert other["score"] is None and "retention gates made for another model" in other["error"]
