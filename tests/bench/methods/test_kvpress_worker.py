"""Our policies against kvpress's presses on the real default model, on equal settings: `make test-peers`."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from vestige import Budget, InputError, KVCache, Policy, attach, load, policies
from vestige.bench.methods.conversation import Job, TurnIds
from vestige.bench.methods.peers import PeerError, open_peer, presses
from vestige.bench.methods.peers.presses import PressPeer, find_python
from vestige.cache.prefill import finish, prefill
from vestige.models.gguf_wheels import is_cached
from vestige.testing import full_layers, held_mask

pytestmark = pytest.mark.peers

PROMPTS = 10


def reason_to_skip() -> str | None:
    """Return what is missing, if anything is."""
    try:
        find_python()
    except InputError as error:
        return str(error)
    return None if is_cached("smollm2-135m") else "the default model is not here yet: run `make demo` first"


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    """Load the default model in float32, so that rounding decides next to nothing."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    model, tokenizer = load("smollm2-135m", progress=False)
    return model.float(), tokenizer


@pytest.fixture(scope="module")
def prompts(real: tuple[Any, Any]) -> list[tuple[int, ...]]:
    """Cut the shipped document in ten places: 500 to 950 tokens each."""
    document = Path(str(files("vestige") / "data" / "harbour.txt")).read_text()
    ids = tuple(real[1](document, verbose=False)["input_ids"])
    lengths = [500 + 50 * i for i in range(PROMPTS)]
    return [ids[start : start + n] for start, n in zip(range(0, 5000, 500), lengths, strict=True)]


@pytest.fixture(scope="module")
def process(real: tuple[Any, Any]) -> Iterator[PressPeer]:
    """Keep the process alive for the whole module: presses of one source share it."""
    with opened("KnormPress", real[0]) as peer:
        yield peer


@contextmanager
def opened(press: str, model: Any) -> Iterator[PressPeer]:
    with open_peer(f"kvpress:{press}", model=model, timeout_s=300) as peer:
        assert isinstance(peer, PressPeer)
        yield peer


def settings(keep: int) -> dict[str, tuple[str, Policy]]:
    """Return press and policy by name, with the press's own sink and window."""
    budget = Budget.tokens(keep)
    return {
        "knorm": ("KnormPress", policies.KNorm(budget=budget, sink=0, window=0)),
        "keydiff": ("KeyDiffPress", policies.KeyDiff(budget=budget, sink=0, window=0)),
        "tova": ("TOVAPress", policies.TOVA(budget=budget, sink=0, window=1)),
        "snapkv": (
            "SnapKVPress(window_size=32, kernel_size=5)",
            policies.SnapKV(budget=budget, sink=0, window=32, observed=32, kernel=5),
        ),
        "streaming_llm": ("StreamingLLMPress(n_sink=4)", policies.StreamingLLM(budget=budget, sink=4, window=0)),
    }


def ours(model: Any, ids: tuple[int, ...], chosen: list[Policy]) -> list[dict[int, torch.Tensor]]:
    """Return by policy and layer which pairs stay, from one reading in one piece."""
    whole = KVCache(model, policies.Full(), observers=chosen)
    prefill(model, torch.tensor([ids]), whole, chunk=len(ids))
    kept = []
    for policy in chosen:
        cache = whole.fork(policy)
        finish(model, cache, torch.tensor([ids]))
        kept.append({i: held_mask(cache, cache.layers[i])[0] for i in full_layers(model)})
    return kept


def agreement(mine: dict[int, torch.Tensor], theirs: list[list[list[int]]], keep: int) -> float:
    """Return the share of pairs that both keep; both keep ``keep`` in every row, or it is a failure."""
    common = 0
    for layer, rows in zip(mine.values(), theirs, strict=True):
        for row, positions in zip(layer, rows, strict=True):
            assert int(row.sum()) == len(positions) == keep
            common += int(row[positions].sum())
    return common / (keep * sum(len(rows) for rows in theirs))


@pytest.fixture(scope="module")
def agreements(
    real: tuple[Any, Any], prompts: list[tuple[int, ...]], process: PressPeer
) -> dict[str, list[tuple[float, str]]]:
    """Read every prompt once on our side; keep a fifth or a half of it."""
    model, found = real[0], {name: [] for name in settings(100)}
    with torch.no_grad(), attach(model):
        for number, ids in enumerate(prompts):
            keep = len(ids) // (5 if number % 2 else 2)
            pairs = settings(keep)
            mine = ours(model, ids, [policy for _, policy in pairs.values()])
            for (name, (press, _)), kept in zip(pairs.items(), mine, strict=True):
                with opened(press, model) as peer:
                    share = agreement(kept, peer.find_kept(ids, keep), keep)
                found[name].append((share, f"{len(ids)} tokens, {keep} kept"))
    return found


@pytest.mark.parametrize("name", settings(100))
def test_a_policy_keeps_the_pairs_that_its_press_keeps(name, agreements):
    assert len(agreements[name]) == PROMPTS
    print(name, *(f"{share:.4f}" for share, _ in agreements[name]))
    assert min(agreements[name])[0] >= 0.99, agreements[name]


def test_a_seeded_random_press_keeps_its_count_in_every_row(real, prompts, process):
    with opened("RandomPress(seed=3)", real[0]) as peer:
        kept = peer.find_kept(prompts[0], 123)
    assert {len(row) for rows in kept for row in rows} == {123}
    assert all(row == sorted(set(row)) and row[0] >= 0 and row[-1] < len(prompts[0]) for rows in kept for row in rows)


def job(prompt: tuple[int, ...], keep: int | None, turns: int = 1) -> Job:
    turn = TurnIds(context=prompt[:400], question=prompt[400:410], max_new_tokens=6)
    more = TurnIds(context=prompt[410:430], question=prompt[430:440], max_new_tokens=4)
    return Job(turns=(turn, more)[:turns], stop=(2,), keep=keep)


def test_without_eviction_a_press_answers_as_a_dynamic_cache_does(real, prompts, process):
    for turns in (1, 2):
        with open_peer("transformers:dynamic", model=real[0]) as plain:
            expected = plain.run(job(prompts[0], None, turns))
        found = process.run(job(prompts[0], 400, turns))
        assert found.replies == expected.replies
        assert (found.seen, found.held, found.full) == (expected.seen, expected.held, expected.full)
        assert (found.kv_bytes, found.full_kv_bytes) == (expected.kv_bytes, expected.full_kv_bytes)
        assert found.peak_kv_bytes == expected.peak_kv_bytes and found.kept == expected.kept


@pytest.mark.parametrize("keep", [1, 37, 199, 399])
def test_a_press_keeps_exactly_what_the_budget_says_and_frees_the_rest(real, prompts, process, keep):
    found = process.run(job(prompts[1], keep))
    layers, heads, pair_bytes = 30, 3, 2 * 64 * 4
    assert found.held == layers * heads * keep and found.full == layers * heads * 400
    assert found.kv_bytes == found.held * pair_bytes
    # While the last layer is compressed, it is there whole and compressed.
    assert found.peak_kv_bytes == max(layers * keep + 400, 400 + keep) * heads * pair_bytes
    assert 0 < found.evict_s < found.prefill_s
    assert found.note == "kvpress 0.5.5"


MASKED = "kvpress 0.5.5; 27,000 of 36,000 pairs masked, none freed"


@pytest.mark.parametrize(
    ("press", "note"),
    [
        ("AdaKVPress(SnapKVPress(window_size=32))", f"{MASKED}$"),
        ("KVzipPress", f"{MASKED}; [0-9,]+ bytes more are alive behind views$"),  # of its replays
    ],
)
def test_masked_pairs_count_as_held_because_nothing_is_freed(real, prompts, process, press, note):
    with opened(press, real[0]) as peer:
        found = peer.run(job(prompts[2], 100))
        assert found.held == found.full == 90 * 400
        assert re.fullmatch(note, found.note)
        indices = 27_000 * 3 * 8
        spare = int((re.search("([0-9,]+) bytes more", found.note) or ["", "0"])[1].replace(",", ""))
        assert found.kv_bytes == found.full_kv_bytes + indices + spare
        kept = peer.find_kept(prompts[2][:400], 100)
    assert sum(len(row) for rows in kept for row in rows) == 90 * 100


def test_a_later_context_is_not_compressed_and_the_row_says_so(real, prompts, process):
    found = process.run(job(prompts[3], 100, turns=2))
    later = found.seen - 400
    assert later == 10 + len(found.replies[0]) - 1 + (found.replies[0][-1] != 2) + 20
    assert found.held == 90 * (100 + later) and found.full == 90 * (400 + later)
    assert "only the first context is compressed" in found.note


def test_what_a_masking_press_left_does_not_reach_the_next_job(real, prompts, process):
    before = process.run(job(prompts[4], 200))
    with opened("AdaKVPress(KnormPress)", real[0]) as peer:
        peer.run(job(prompts[4], 200))
    after = process.run(job(prompts[4], 200))
    assert after.replies == before.replies and after.kv_bytes == before.kv_bytes


@pytest.mark.parametrize(
    ("press", "says"),
    [
        ("SnapVPress", "kvpress 0.5.5 has no SnapVPress; it has AdaKVPress"),
        ("DuoAttentionPress", "compression ratio cannot be set"),
        ("DecodingPress(KnormPress)", "DecodingPress has no compression_ratio of its own"),
        ("SnapKVPress(windw=3)", "TypeError"),
    ],
)
def test_a_press_that_cannot_run_says_why_and_the_process_lives_on(real, prompts, process, press, says):
    with opened(press, real[0]) as peer, pytest.raises(PeerError, match=says) as error:
        peer.run(job(prompts[5], 100))
    assert "\n" not in str(error.value)
    assert process.run(job(prompts[5], 100)).held == 9000


def test_the_worker_ends_with_its_parent_even_in_the_middle_of_a_job(real):
    script = str(presses._SCRIPT)
    pipe = subprocess.PIPE
    with subprocess.Popen([find_python(), script], stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8") as worker:
        load = {
            "id": 1,
            "op": "load",
            "folder": real[0].name_or_path,
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
        }
        out, _ = worker.communicate(json.dumps(load) + "\n", timeout=60)  # closes stdin before the model can be there
    assert worker.returncode == 0 and out == ""
