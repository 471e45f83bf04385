"""Peers: their names, the process that kvpress lives in, and the caches of transformers."""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from vestige import InputError, attach
from vestige.bench.methods import peers
from vestige.bench.methods.conversation import Job, Outcome, TurnIds
from vestige.bench.methods.kvpress_worker import find_ratio, match_keys
from vestige.bench.methods.peers import PeerError, open_peer, presses
from vestige.bench.methods.peers.names import parse
from vestige.bench.metrics.byte_meter import ByteMeter, storage_bytes
from vestige.models.compat import cache_argument
from vestige.testing import random_ids, tiny
from vestige.utils import options

FAKE = """
import json, os, sys, time
with open("lives", "a") as lives:
    lives.write(f"{os.getpid()}\\n")
for line in sys.stdin:
    asked = json.loads(line)
    answer = {"id": asked["id"], "result": {}}
    press = asked.get("press", {}).get("name")
    if press == "DyingPress":
        print("reading\\nout of memory", file=sys.stderr, flush=True)
        sys.exit(3)
    if press == "HangingPress":
        time.sleep(60)
    if press == "BabblingPress":
        print("loading weights ...", flush=True)
    if press == "StalePress":
        answer["id"] -= 1
    if press == "FailingPress":
        print("a warning", file=sys.stderr, flush=True)
        time.sleep(0.1)
        answer = {"id": asked["id"], "error": "ValueError: too short"}
    if press == "GoodPress":
        answer["result"] = {
            "replies": [[asked["job"]["keep"], len(asked["job"]["turns"][0]["context"])]],
            "seen": 9, "held": 6, "full": 12, "kv_bytes": 60, "peak_kv_bytes": 70, "full_kv_bytes": 120,
            "prefill_s": 2, "evict_s": 0.5, "decode_ms": None,
            "kept": [[3], [3]], "note": json.dumps(asked["press"]["options"]),
        }
    print(json.dumps(answer), flush=True)
"""

JOB = Job(turns=(TurnIds(context=(5, 6, 7), question=(8,), max_new_tokens=4),), stop=(2,), keep=40)


@pytest.fixture
def faked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a script stand in for the worker; each of its lives is a line of the file ``lives``."""
    script = tmp_path / "worker.py"
    script.write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(presses, "_SCRIPT", script)
    monkeypatch.setenv("VESTIGE_PEERS_PYTHON", sys.executable)
    return tmp_path


def fake_peer(press: str, folder: Path, timeout_s: float | int = 30) -> peers.Peer:
    return open_peer(f"kvpress:{press}", model=tiny("llama"), folder=folder, timeout_s=timeout_s)


def lives(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "lives").read_text().split()]


def is_gone(pid: int) -> bool:
    """Return whether a process has ended and was waited for: a zombie still takes signals."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# Names


def test_names_are_taken_apart_without_running_anything():
    assert parse("kvpress:SnapKVPress").call == {"name": "SnapKVPress", "args": [], "options": {}}
    nested = parse("kvpress:AdaKVPress(SnapKVPress(window_size=64), alpha_safeguard=0.5)").call
    inner = {"name": "SnapKVPress", "args": [], "options": {"window_size": 64}}
    assert nested == {"name": "AdaKVPress", "args": [inner], "options": {"alpha_safeguard": 0.5}}
    assert parse("kvpress:RandomPress(seed=-3, flags=[True, None, 'x'])").call["options"] == {
        "seed": -3,
        "flags": [True, None, "x"],
    }
    assert parse("transformers:quantized(nbits=2)").call["options"] == {"nbits": 2}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "kvpres:SnapKVPress",
            "unknown peer 'kvpres:SnapKVPress'.* available: kvpress:<press class>, transformers:dyn",
        ),
        ("snapkv", "unknown peer 'snapkv'"),
        ("kvpress:", "unknown peer 'kvpress:'"),
        ("transformers:dynamik", "did you mean 'transformers:dynamic'"),
        ("transformers:dynamic(nbits=2)", "takes no options"),
        ("transformers:quantized(2)", "takes backend, nbits, .* by name"),
        ("transformers:quantized(bits=2)", "takes backend, nbits"),
        ("transformers:quantized(nbits=2.5)", "nbits must be a whole number, got 2.5"),
        ("transformers:quantized(backend='hhq')", "unknown backend 'hhq'; did you mean 'hqq'"),
        ("kvpress:snapkv", "snapkv does not name a press class, such as SnapKVPress"),
        ("kvpress:SnapKVPress(window_size=", "cannot read peer"),
        ("kvpress:SnapKVPress(compression_ratio=0.5)", "compression_ratio follows from --budget"),
        ("kvpress:AdaKVPress(KnormPress(compression_ratio=0.5))", "compression_ratio follows from --budget"),
        ("kvpress:AdaKVPress(snapkv)", "snapkv does not name a press class"),
        ("kvpress:SnapKVPress(window_size=8*8)", "8 \\* 8 is not a plain value"),
        ("kvpress:SnapKVPress(**{})", "must be written out"),
        ("kvpress:SnapKVPress(x={1: 2})", "is not a plain value"),
        ("kvpress:SnapKVPress(x=1e999)", "is not a plain value"),
        ("kvpress:__import__('os').system('x')", "is not a class with plain arguments"),
        ("kvpress:SnapKVPress(x=__import__('os'))", "does not name a press class"),
        ("kvpress:Snap\0Press", "cannot read peer"),
    ],
)
def test_names_that_cannot_be_read_are_refused_in_one_line(name, says):
    with pytest.raises(InputError, match=says) as error:
        peers.check(name)
    assert "\n" not in str(error.value)


def test_only_presses_take_a_budget():
    assert peers.takes_budget("kvpress:KnormPress")
    assert not peers.takes_budget("transformers:dynamic")
    assert not peers.takes_budget("transformers:quantized(nbits=2)")


def test_a_list_of_names_is_split_at_its_own_commas_only():
    text = "kvpress:AdaKVPress(SnapKVPress(window_size=8,kernel_size=3),alpha_safeguard=0.1), transformers:dynamic,"
    first, second = options.split(text)
    assert first.endswith("alpha_safeguard=0.1)") and second == "transformers:dynamic"


# The process


def test_a_job_goes_out_and_its_outcome_comes_back(faked):
    with fake_peer("GoodPress(window_size=8)", faked) as peer:
        assert peer.run(JOB) == Outcome(
            replies=((40, 3),),
            seen=9,
            held=6,
            full=12,
            kv_bytes=60,
            peak_kv_bytes=70,
            full_kv_bytes=120,
            prefill_s=2.0,
            evict_s=0.5,
            decode_ms=None,
            kept=((3,), (3,)),
            note='{"window_size": 8}',
        )


@pytest.mark.parametrize(
    ("press", "says", "ends"),
    [
        ("DyingPress", "kvpress died with status 3; it said: reading | out of memory", True),
        ("HangingPress", "kvpress gave no answer in 2 s", True),
        ("BabblingPress", "kvpress wrote what is no answer: 'loading weights ...'", True),
        ("StalePress", 'kvpress wrote what is no answer: \'{"id": ', True),
        ("FailingPress", "kvpress failed: ValueError: too short; it said: a warning", False),
        ("SilentPress", "kvpress:SilentPress gave an answer that cannot be read: KeyError('replies')", False),
    ],
)
def test_a_worker_that_misbehaves_is_reported_and_replaced(faked, press, says, ends):
    with fake_peer("GoodPress", faked) as good, fake_peer(press, faked, timeout_s=2) as bad:
        assert good.run(JOB).seen == 9
        with pytest.raises(PeerError) as error:
            bad.run(JOB)
        assert str(error.value).startswith(says) and "\n" not in str(error.value)
        assert is_gone(lives(faked)[0]) == ends
        assert good.run(JOB).seen == 9
        assert len(lives(faked)) == 1 + ends
    assert all(is_gone(pid) for pid in lives(faked))


def test_presses_of_one_model_share_one_process_that_ends_with_the_last(faked):
    first, second = fake_peer("GoodPress", faked), fake_peer("GoodPress(x=1)", faked)
    assert not (faked / "lives").exists()  # started by the first job, not before
    first.run(JOB)
    second.run(JOB)
    (pid,) = lives(faked)
    first.close()
    first.close()
    assert not is_gone(pid)
    second.close()
    assert is_gone(pid)
    with pytest.raises(PeerError, match="is closed"):
        first.run(JOB)


def test_a_worker_that_cannot_be_started_is_a_peer_error(faked, monkeypatch):
    python = faked / "python"
    python.write_text("not a program")
    monkeypatch.setenv("VESTIGE_PEERS_PYTHON", str(python))
    with fake_peer("GoodPress", faked) as peer, pytest.raises(PeerError, match="kvpress cannot be started"):
        peer.run(JOB)


@pytest.mark.parametrize("named", [None, "/nowhere/python"])
def test_without_the_peer_environment_the_error_says_how_to_make_it(faked, monkeypatch, named):
    if named:
        monkeypatch.setenv("VESTIGE_PEERS_PYTHON", named)
    else:
        monkeypatch.delenv("VESTIGE_PEERS_PYTHON")
    with pytest.raises(InputError) as error:
        fake_peer("GoodPress", faked)
    assert str(error.value) == "kvpress is not installed: run `make peers`, or set VESTIGE_PEERS_PYTHON"


def test_the_peer_environment_is_found_beside_the_current_folder(faked, monkeypatch):
    monkeypatch.delenv("VESTIGE_PEERS_PYTHON")
    python = faked / ".venv-peers" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert presses.find_python() == str(python)


def test_a_model_that_is_no_folder_is_refused(faked):
    with pytest.raises(InputError, match="kvpress loads the model from a folder, and '.*' is none"):
        fake_peer("GoodPress", faked / "nowhere")


def test_a_model_from_the_hub_is_loaded_from_where_it_was_fetched_to(faked, monkeypatch):
    asked = []

    def cached(name: str, *, local_files_only: bool) -> str:
        asked.append((name, local_files_only))
        return str(faked)

    monkeypatch.setattr(presses, "snapshot_download", cached)
    assert presses.Source.of("someone/a-model", "cpu", torch.float32).folder == str(faked)
    assert asked == [("someone/a-model", True)]


# The worker's arithmetic


@pytest.mark.parametrize("rows", [1, 2, 90, 640])
def test_the_ratio_keeps_exactly_what_was_asked(rows):
    for length in (2, 3, 7, 100, 1021, 4096, 131_072):
        for keep in {1, 2, length // 3, length // 2, length - 1} - {0}:
            ratio = find_ratio(keep, length, rows, counts_pruned=False)
            assert 0 <= ratio < 1
            assert int(length * (1 - ratio)) == round(length * (1 - ratio)) == keep
            assert int(rows * length * (1 - ratio)) == rows * keep
            ratio = find_ratio(keep, length, rows, counts_pruned=True)
            assert 0 <= ratio < 1 and int(rows * length * ratio) == rows * (length - keep)


def test_a_budget_that_holds_everything_does_not_compress():
    assert {find_ratio(keep, 100, 6, counts_pruned=False) for keep in (None, 100, 101)} == {0.0}


def test_kept_positions_are_found_by_their_keys_each_once():
    keys = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0]])
    assert match_keys(keys, keys[[3, 0]]) == [0, 3]
    assert match_keys(keys, keys[[2, 0]]) == [0, 2]


# The caches of transformers


def text(model: Any, *lengths: int) -> list[tuple[int, ...]]:
    ids = random_ids(model, 1, sum(lengths), seed=5)[0].tolist()
    return [tuple(ids[sum(lengths[:i]) : sum(lengths[: i + 1])]) for i in range(len(lengths))]


def generated(model: Any, ids: tuple[int, ...], new: int) -> tuple[int, ...]:
    given = torch.tensor([ids])
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False)
    return tuple(out[0, len(ids) :].tolist())


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_dynamic_cache_answers_two_turns_as_generate_does(attached, stopped):
    model = tiny("llama")
    first, question, second, again = text(model, 30, 5, 20, 4)
    free = generated(model, first + question, 8)
    stop = (free[3],) if stopped else ()
    said = free[: free.index(free[3]) + 1] if stopped else free
    fed = said[:-1] if stopped else said
    then = generated(model, first + question + fed + second + again, 6)
    if stopped and stop[0] in then:
        then = then[: then.index(stop[0]) + 1]
    turns = (
        TurnIds(context=first, question=question, max_new_tokens=8),
        TurnIds(context=second, question=again, max_new_tokens=6),
    )
    job = Job(turns=turns, stop=stop, keep=3)
    with open_peer("transformers:dynamic", model=model) as peer:
        if attached:
            with torch.no_grad(), attach(model):
                found = peer.run(job)
        else:
            found = peer.run(job)
    assert found.replies == (said, then)
    seen = 30 + 5 + len(fed) + 20
    pairs, pair_bytes = 3 * 2 * seen, 2 * 16 * 4
    assert (found.seen, found.held, found.full) == (seen, pairs, pairs)
    assert found.kv_bytes == found.full_kv_bytes == found.peak_kv_bytes == pairs * pair_bytes
    assert found.kept == ((seen, seen),) * 3
    assert found.evict_s == 0 < found.prefill_s and found.decode_ms > 0


def test_one_token_replies_have_no_decode_time():
    model = tiny("llama")
    context, question = text(model, 9, 2)
    job = Job(turns=(TurnIds(context=context, question=question, max_new_tokens=1),), stop=())
    with open_peer("transformers:dynamic", model=model) as peer:
        assert peer.run(job).decode_ms is None


def test_layers_that_slide_are_left_out_of_the_numbers():
    model = tiny("gemma3")  # two of six layers see everything
    context, question = text(model, 20, 3)
    job = Job(turns=(TurnIds(context=context, question=question, max_new_tokens=3),), stop=())
    with open_peer("transformers:dynamic", model=model) as peer:
        found = peer.run(job)
    assert found.held == found.full == 2 * 2 * 20
    assert found.kv_bytes == found.full_kv_bytes == 2 * 2 * 20 * 2 * 16 * 4


def test_copies_are_equal_batch_rows_and_weigh_as_many_times_as_much():
    model = tiny("llama")
    context, question = text(model, 20, 4)
    one = Job(turns=(TurnIds(context=context, question=question, max_new_tokens=7),), stop=())
    with open_peer("transformers:dynamic", model=model) as peer:
        alone, copied = peer.run(one), peer.run(replace(one, copies=3))
    assert copied.replies == alone.replies == (generated(model, context + question, 7),)
    for name in ("held", "full", "kv_bytes", "full_kv_bytes"):
        assert getattr(copied, name) == 3 * getattr(alone, name), name
    assert [len(layer) for layer in copied.kept] == [6, 6, 6]


needs_quanto = pytest.mark.skipif(
    importlib.util.find_spec("optimum") is None, reason="optimum-quanto is not installed: the bench extra brings it"
)


@needs_quanto
def test_a_quantised_cache_is_smaller_and_weighed_with_its_scales():
    from vestige.bench.methods.peers.caches import CachePeer

    model, sizes = tiny("llama"), {}
    (context,) = text(model, 128)
    for name in ("dynamic", "quantized", "quantized(nbits=2)"):
        cache = CachePeer(parse(f"transformers:{name}"), model)._make_cache()
        model(torch.tensor([context]), **cache_argument(cache))
        sizes[name] = storage_bytes(cache.layers)
    numbers = 3 * 2 * 2 * 128 * 16
    groups = numbers // 64
    assert sizes["dynamic"] == 4 * numbers
    assert sizes["quantized"] == numbers // 2 + groups * 2 * 4  # a scale and a shift for 64 numbers
    assert sizes["quantized(nbits=2)"] == numbers // 4 + groups * 2 * 4


@needs_quanto
@pytest.mark.slow  # the first time, quanto compiles an extension
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_cache_holds_a_conversation_on_an_attached_model():
    model = tiny("llama")
    context, question, more = text(model, 128, 6, 10)
    turns = tuple(TurnIds(context=ids, question=question, max_new_tokens=5) for ids in (context, more))
    job = Job(turns=turns, stop=())
    with attach(model), open_peer("transformers:quantized", model=model) as peer:
        found = peer.run(job)
    assert len(found.replies[0]) == 5 and found.note == "backend quanto, nbits 4"
    seen = 128 + 6 + 4 + 1 + 10
    assert found.held == found.full == 3 * 2 * seen
    assert found.full_kv_bytes == found.held * 2 * 16 * 4
    # 128 tokens of 64 numbers at 4 bits, with a scale and a shift for each, in 3 layers; the others are whole.
    assert found.kv_bytes == 3 * 128 * (32 + 2 * 4) + 3 * (seen - 128) * 64 * 4
    assert found.peak_kv_bytes == found.kv_bytes + seen * 64 * 4  # one layer at a time is restored


def test_an_absent_backend_names_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'quanto is not installed: pip install "vestige\[bench\]"'):
        open_peer("transformers:quantized", model=tiny("llama"))
    with pytest.raises(InputError, match="hqq is not installed: pip install hqq"):
        open_peer("transformers:quantized(backend='hqq')", model=tiny("llama"))


@needs_quanto
def test_options_that_a_backend_refuses_are_refused_before_reading():
    with pytest.raises(InputError, match="cannot be made: .*nbits.* but got 3"):
        open_peer("transformers:quantized(nbits=3)", model=tiny("llama"))


@needs_quanto
def test_a_cache_class_that_fails_is_a_peer_error():
    model = tiny("llama")  # 2 heads of 16 and 3 tokens are no groups of 64
    with open_peer("transformers:quantized", model=model) as peer, pytest.raises(PeerError, match="Group size"):
        peer.run(JOB)


# Weighing


def test_a_storage_counts_once_and_whole():
    base = torch.zeros(100)
    assert storage_bytes([base, base[:10], {"view": base.view(10, 10)}]) == 400
    assert storage_bytes(base[:10].clone()) == 40
    assert storage_bytes((base[:1], torch.zeros(3, dtype=torch.int64))) == 400 + 24
    assert storage_bytes([None, "text", 3, tiny("llama"), []]) == 0


def test_what_points_at_itself_is_weighed():
    ring: dict[str, Any] = {"keys": torch.zeros(4)}
    ring["self"] = ring
    assert storage_bytes(ring) == 16


def test_scales_leave_the_cache_as_it_was_and_keep_the_peak():
    model = tiny("llama")
    cache, meter = DynamicCache(config=model.config), ByteMeter([0, 2])
    with meter.watch(cache):
        model(random_ids(model, 1, 12), **cache_argument(cache))
        assert meter.measure(cache, torch.zeros(1000)) == 2 * 2 * 12 * 2 * 16 * 4 + 4000
    assert "update" not in vars(cache)
    assert meter.heads == {0: 2, 2: 2} and meter.pair_bytes == {0: 256, 2: 256}
    assert meter.peak_bytes == 2 * 2 * 12 * 2 * 16 * 4 + 4000


def test_the_worker_stands_alone():
    source = Path(peers.__file__).parents[1] / "kvpress_worker.py"
    imports = [line for line in source.read_text().splitlines() if line.startswith(("import ", "from "))]
    assert imports and not any("vestige" in line for line in imports)
    assert json.dumps(parse("kvpress:ComposedPress([KnormPress, SnapKVPress])").call)
