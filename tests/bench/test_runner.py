"""A whole run: rows and records, what an interrupt, a failure and other data leave, and how often anything is read."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vestige import InputError
from vestige.bench.config import BenchConfig
from vestige.bench.methods import vestige_runner
from vestige.bench.methods.conversation import Job, Outcome
from vestige.bench.methods.method import Method, cross
from vestige.bench.methods.peers import Peer, PeerError
from vestige.bench.runner import bench
from vestige.bench.sample import Turn
from vestige.bench.tokenization import Renderer

PRESS = "kvpress:SnapKVPress"
CLOCKS = {"prefill_s", "evict_s", "decode_ms"}


def case(n: int, **changes: Any) -> dict[str, Any]:
    lines = "\n".join(f"Line {k}: the keeper of lamp {n + k} is called {(n * k) % 97:x}." for k in range(4))
    made = {"task": "lamps", "context": lines, "question": f"Who keeps lamp {n}?", "answer": "e", "max_new_tokens": 3}
    return made | {"length": 200} | changes


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def measure(tmp_path, out, chatter):
    """Run cases through arms and return the rows."""

    def call(cases: list[dict[str, Any]], *arms: Method, **options: Any) -> list[dict[str, Any]]:
        file = tmp_path / "cases.jsonl"
        file.write_text("\n".join(map(json.dumps, cases)))
        given = {name: options.pop(name) for name in ("resume", "progress", "out") if name in options}
        config = BenchConfig(tasks=("cases",), methods=arms, cases=file, **options)
        return bench(config, *chatter, name="tiny", **({"out": out} | given))

    return call


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


def replies(out: Path) -> dict[tuple[Any, ...], list[str]]:
    return {
        (r["task"], r["index"], *r["arm"].values()): [turn["prediction"] for turn in r["turns"]] for r in records(out)
    }


FULL, SNAP, HALF = (
    Method(policy="full", share="head"),
    Method(policy="snapkv", budget="40"),
    Method(policy="random", budget="0.5"),
)
CASES = [case(n) for n in (3, 40)]


@pytest.fixture
def ran(monkeypatch) -> Counter[tuple[str, int]]:
    """Count what our arms run, by policy and the first context's length."""
    counted: Counter[tuple[str, int]] = Counter()
    original = vestige_runner.run

    def counting(model: Any, jobs: Any, policy: Any, **options: Any) -> list[Outcome]:
        counted.update((type(policy).__name__, hash(job.turns)) for job in jobs)
        return original(model, jobs, policy, **options)

    monkeypatch.setattr(vestige_runner, "run", counting)
    return counted


class FakePeer(Peer):
    """Another method: replies with its first ids and says that it kept what it was told."""

    def __init__(self, fails: Callable[[int], BaseException | None] = lambda call: None) -> None:
        self.fails, self.jobs, self.closed = fails, [], 0

    def run(self, job: Job) -> Outcome:
        self.jobs.append(job)
        if (error := self.fails(len(self.jobs))) is not None:
            raise error
        seen, keep = len(job.turns[0].context), job.keep or len(job.turns[0].context)
        return Outcome(
            replies=tuple(turn.question[:2] for turn in job.turns), seen=seen, held=keep * 6, full=seen * 6,
            kv_bytes=keep * 768, peak_kv_bytes=seen * 768, full_kv_bytes=seen * 768, prefill_s=0.1, evict_s=0.05,
            decode_ms=1.5, kept=((keep, keep),) * 3, note="made up",
        )  # fmt: skip

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def peer(monkeypatch) -> FakePeer:
    fake = FakePeer()
    monkeypatch.setattr("vestige.bench.runner.peers.open_peer", lambda name, **options: fake)
    return fake


ROW: dict[str, type | tuple[type, ...]] = {
    "task": str, "length": int, "policy": str, "share": (str, type(None)), "memory": str, "budget": str,
    "peer": (str, type(None)), "split": str, "question_aware": bool, "model": str, "chunk": (int, type(None)),
    "batch": int, "seed": int, "score": float, "score_ci95": list, "n": int, "kept_fraction": float,
    "held": (int, float), "full": (int, float), "kv_bytes": (int, float), "peak_kv_bytes": (int, float),
    "full_kv_bytes": (int, float), "memory_bytes": (int, float), "prefill_s": float, "evict_s": float,
    "decode_ms": (float, type(None)), "parts": list,
    "turns": list, "kept": list, "revision": (str, type(None)), "versions": dict, "device": str, "dtype": str,
    "note": (str, type(None)),
}  # fmt: skip
RECORD = {
    "task", "length", "index", "tags", "arm", "turns", "score", "seen", "held", "full", "kept_fraction", "kv_bytes",
    "peak_kv_bytes", "full_kv_bytes", "memory_bytes", "prefill_s", "evict_s", "decode_ms", "kept", "batch", "note",
}  # fmt: skip
TURN = {"question", "answer_prefix", "answers", "prediction", "metric", "max_new_tokens", "score"}


def test_rows_and_records_have_every_promised_field(measure, out, peer, chatter):
    rows = measure(CASES, FULL, SNAP, HALF, Method(policy=PRESS, budget="0.5", peer=PRESS), seed=3, question_aware=True)
    assert json.loads((out / "rows.json").read_text())["rows"] == json.loads(json.dumps(rows)) == rows
    for row in rows:
        for name, kind in ROW.items():
            assert name in row and isinstance(row[name], kind), (name, row.get(name))
        assert row["versions"].keys() == {"vestige", "torch", "transformers", "python"}
        assert (row["task"], row["length"], row["n"], row["model"], row["split"]) == ("lamps", 200, 2, "tiny", "dev")
        assert (row["seed"], row["chunk"], row["question_aware"], row["dtype"]) == (3, None, True, "float32")
        assert 0 <= row["score_ci95"][0] <= row["score"] <= row["score_ci95"][1] <= 1
        assert row["kept_fraction"] == row["held"] / row["full"] <= 1
        assert row["prefill_s"] >= row["evict_s"] >= 0 == row["memory_bytes"]
        assert row["kv_bytes"] <= row["peak_kv_bytes"] and row["turns"] == row["parts"] == []
        assert sum(map(sum, row["kept"])) == row["held"] and len(row["kept"]) == 3
    assert [(row["policy"], row["budget"], row["peer"]) for row in rows] == [
        ("full", "1.0", None), ("snapkv", "40", None), ("random", "0.5", None), (PRESS, "0.5", PRESS),
    ]  # fmt: skip
    assert rows[0]["kept_fraction"] == 1.0 and rows[1]["held"] == 40 * 6 and rows[3]["note"] == "made up"
    for one in records(out):
        assert one.keys() >= RECORD and all(turn.keys() >= TURN for turn in one["turns"])
        assert one["score"] == one["turns"][0]["score"] in (0.0, 1.0)
        assert one["turns"][0]["answers"] == ["e"] and one["turns"][0]["max_new_tokens"] == 3
        assert one["index"] in (1, 2) and one["batch"] == 1 and one["arm"]["memory"] == "none"
    said = chatter[1].decode(peer.jobs[0].turns[0].question[:2], skip_special_tokens=True)
    assert records(out)[3]["turns"][0]["prediction"] == said


def test_question_aware_compresses_the_question_too(measure, out, tmp_path):
    measure(CASES[:1], FULL)
    measure(CASES[:1], FULL, SNAP, question_aware=True, out=tmp_path / "aware")
    before, after = records(out)[0], records(tmp_path / "aware")
    assert after[0]["turns"][0]["prediction"] == before["turns"][0]["prediction"]  # to full it is all the same
    assert after[0]["seen"] > before["seen"] + 10 and after[1]["seen"] == after[0]["seen"]
    assert after[1]["held"] == 40 * 6


def test_a_score_is_the_mean_over_turns_and_rows_have_each(measure, out, tmp_path):
    first = {key: value for key, value in case(3).items() if key not in ("task", "length")}
    measure([case(3)], FULL, out=tmp_path / "first")
    reply = records(tmp_path / "first")[0]["turns"][0]["prediction"]
    turns = [first | {"answer": reply}, {"question": "And lamp 4?", "answer": "no such reply", "max_new_tokens": 2}]
    (row,) = measure([{"task": "talk", "length": 300, "turns": turns}], FULL)
    assert [(turn["turn"], turn["score"], turn["n"]) for turn in row["turns"]] == [(0, 1.0, 1), (1, 0.0, 1)]
    assert row["score"] == records(out)[0]["score"] == 0.5


def test_two_runs_with_one_seed_predict_the_same(measure, out, tmp_path):
    arms = (FULL, SNAP, HALF)
    first = measure(CASES, *arms)
    second = measure(CASES, *arms, out=tmp_path / "again")
    assert timeless(first) == timeless(second) and replies(out) == replies(tmp_path / "again")


def test_batches_predict_what_single_samples_do(measure, out, tmp_path):
    cases = [case(n) for n in (3, 4, 5)]
    measure(cases, FULL, SNAP, HALF)
    rows = measure(cases, FULL, SNAP, HALF, batch=2, out=tmp_path / "batched")
    assert replies(out) == replies(tmp_path / "batched")
    assert {row["batch"] for row in rows} == {2}
    held = [
        {(r["index"], r["arm"]["policy"]): (r["held"], r["full"], r["kept"]) for r in records(folder)}
        for folder in (out, tmp_path / "batched")
    ]
    assert held[0] == held[1]


def interrupt_after(calls: int) -> Callable[..., None]:
    """Return a progress callback that a user interrupts."""
    left = [None] * calls

    def progress(*_: object) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()

    return progress


@pytest.mark.parametrize("batch", [1, 2])
def test_an_interrupted_run_goes_on_without_repeating_anything(measure, out, tmp_path, ran, peer, batch):
    cases, arms = [case(n) for n in (3, 40, 41)], (FULL, SNAP, Method(policy=PRESS, budget="40", peer=PRESS), HALF)
    expected = measure(cases, *arms, batch=batch, out=tmp_path / "whole")
    once, asked = Counter(ran), len(peer.jobs)
    assert asked == 3 and len(once) == 9 and set(once.values()) == {1}
    ran.clear()
    for calls in (2, 3, 1):
        with pytest.raises(KeyboardInterrupt):
            measure(cases, *arms, batch=batch, resume=True, progress=interrupt_after(calls))
        assert json.loads((out / "rows.json").read_text())["rows"] is not None
    rows = measure(cases, *arms, batch=batch, resume=True)
    assert ran == once and len(peer.jobs) == 2 * asked
    assert len(records(out)) == 12 and timeless(rows) == timeless(expected)


def test_an_interrupt_within_a_peers_batch_loses_none_of_its_samples(measure, out, peer):
    peer.fails = lambda call: KeyboardInterrupt() if call == 3 else None
    arm = Method(policy=PRESS, budget="40", peer=PRESS)
    cases = [case(n) for n in (3, 4, 5)]
    with pytest.raises(KeyboardInterrupt):
        measure(cases, arm, batch=3)
    assert len(records(out)) == 2 and peer.closed == 1
    measure(cases, arm, batch=3, resume=True)
    assert len(peer.jobs) == 4 and len(records(out)) == 3


def test_arms_and_samples_that_were_added_alone_are_run(measure, out, ran):
    measure(CASES, FULL, samples=1)
    measure(CASES, FULL, SNAP, samples=1, resume=True)
    assert sum(ran.values()) == 2
    rows = measure(CASES, FULL, SNAP, samples=2, resume=True)
    assert sum(ran.values()) == 4 and set(ran.values()) == {1}
    assert [(row["policy"], row["n"]) for row in rows] == [("full", 2), ("snapkv", 2)]
    assert [(row["policy"], row["n"]) for row in measure(CASES, HALF, samples=1, resume=True)] == [
        ("full", 2), ("snapkv", 2), ("random", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change", [{"context": "Another text."}, {"question": "What?"}, {"answer": "f"}, {"metric": "f1"}]
)
def test_other_data_under_the_same_number_are_refused(measure, out, change):
    measure(CASES, FULL)
    before = (out / "samples.jsonl").read_bytes()
    with pytest.raises(InputError, match="sample 2 of lamps in .* was made from another .*name a new --out"):
        measure([CASES[0], CASES[1] | change], FULL, SNAP, resume=True)
    assert (out / "samples.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"split": "test"}, {"question_aware": True}, {"chunk": 64}, {"batch": 2}]
)
def test_other_settings_are_refused(measure, out, change):
    measure(CASES[:1], FULL)
    with pytest.raises(InputError, match=f"was begun with {next(iter(change))}"):
        measure(CASES[:1], FULL, resume=True, **change)


def test_an_arm_that_fails_is_a_row_and_the_others_finish(measure, out, ran):
    small = Method(policy="snapkv", budget="0.1")
    rows = measure(CASES, small, FULL, SNAP)
    assert {row["policy"] + row["budget"]: row["n"] for row in rows} == {"full1.0": 2, "snapkv40": 2, "snapkv0.1": 0}
    (failed,) = (row for row in rows if row["score"] is None)
    assert "sink and window protect 36" in failed["error"] and "\n" not in failed["error"]
    assert (failed["budget"], failed["memory"], failed["peer"], failed["model"]) == ("0.1", "none", None, "tiny")
    assert {"revision", "versions", "device", "dtype", "split"} <= failed.keys()
    assert len(records(out)) == 4


def test_a_sample_too_short_for_a_budget_is_left_out_and_the_others_go_on(measure, out):
    brief = case(2, context="Line 1.", question="Who?")
    tight = Method(policy="snapkv", budget="0.4")
    rows = measure([CASES[0], brief, CASES[1]], tight, FULL)
    (row,) = (row for row in rows if row["policy"] == "snapkv")
    assert row["n"] == 2 and row["score"] is not None
    assert row["note"].startswith("1 of 3 samples left out: budget 0.4 gives")
    assert len(records(out)) == 5


def test_a_sample_too_short_for_a_budget_does_not_take_its_batch_along(measure, out, chatter):
    long, brief = case(3), case(3, context=case(3)["context"][:-6])
    model, tokenizer = chatter
    (turn,) = (
        Renderer(tokenizer, model).job([Turn(context=long["context"], question=long["question"], answers=())]).turns
    )
    tight = Method(policy="snapkv", budget=f"{36 / (len(turn.context) + len(turn.question)):.4f}9")  # 36 are protected
    (row,) = (one for one in measure([long, brief], tight, FULL, batch=2) if one["policy"] == "snapkv")
    assert row["n"] == 1 and row["note"].startswith("1 of 2 samples left out")
    assert {(r["arm"]["policy"], r["index"], r["batch"]) for r in records(out)} == {
        ("full", 1, 2), ("full", 2, 2), ("snapkv", 1, 1)
    }  # fmt: skip


@pytest.mark.parametrize("error", [PeerError("it hung"), InputError("kvpress is not installed")])
def test_a_peer_that_fails_is_a_row_and_the_others_finish(measure, monkeypatch, error):
    fake = FakePeer(lambda call: error)
    monkeypatch.setattr("vestige.bench.runner.peers.open_peer", lambda name, **options: fake)
    rows = measure(CASES, Method(policy=PRESS, budget="40", peer=PRESS), FULL)
    assert [(row["policy"], row["n"], row.get("error")) for row in rows] == [("full", 2, None), (PRESS, 0, str(error))]
    assert len(fake.jobs) == 1 and fake.closed == 1  # it is not asked again for this task


def test_a_peer_that_cannot_be_opened_is_a_row(measure, monkeypatch):
    def refuse(name: str, **options: Any) -> None:
        raise InputError("kvpress is not installed: run `make peers`")

    monkeypatch.setattr("vestige.bench.runner.peers.open_peer", refuse)
    rows = measure(CASES[:1], FULL, Method(policy=PRESS, budget="40", peer=PRESS))
    assert rows[1]["error"].endswith("run `make peers`") and rows[0]["n"] == 1


def test_an_arm_that_failed_is_tried_again_on_resume(measure, peer):
    arm = Method(policy=PRESS, budget="40", peer=PRESS)
    peer.fails = lambda call: PeerError("out of memory") if call == 2 else None
    assert measure(CASES, arm)[0]["score"] is None
    (row,) = measure(CASES, arm, resume=True)
    assert row["n"] == 2 and "error" not in row and len(peer.jobs) == 3


@pytest.mark.parametrize("batch", [1, 2])
def test_an_arm_runs_no_more_samples_than_it_is_for(measure, out, peer, batch):
    few = Method(policy=PRESS, budget="40", peer=PRESS, samples=1)
    rows = measure(
        [case(n) for n in (3, 4, 5)], FULL, few, Method(policy="snapkv", budget="40", samples=2), batch=batch
    )
    assert {row["policy"]: row["n"] for row in rows} == {"full": 3, PRESS: 1, "snapkv": 2}
    assert len(peer.jobs) == 1


@pytest.mark.parametrize(
    ("budget", "pairs"), [("40", lambda seen, length: 40), ("0.5", lambda seen, length: length // 2)]
)
def test_a_peer_is_told_to_keep_what_our_own_arms_keep(measure, out, peer, budget, pairs):
    measure(CASES, Method(policy="knorm", budget=budget), Method(policy=PRESS, budget=budget, peer=PRESS))
    own = [one["held"] // 6 for one in records(out) if one["arm"]["peer"] is None]
    assert [job.keep for job in peer.jobs] == own
    turns = [job.turns[0] for job in peer.jobs]
    assert own == [pairs(len(t.context), len(t.context) + len(t.question)) for t in turns]


def test_a_peer_without_a_budget_keeps_everything(measure, peer):
    name = "transformers:dynamic"
    (row,) = measure(CASES[:1], *cross((), ("40",), peers=(name,)))
    assert [job.keep for job in peer.jobs] == [None] and (row["budget"], row["kept_fraction"]) == ("1.0", 1.0)


def test_one_prefill_serves_every_policy_and_budget(measure, chatter, monkeypatch):
    arms = cross(("full", "random", "snapkv", "keydiff", "tova"), ("40", "0.5"), shares=("head", "model"))
    fed: list[int] = []
    hook = chatter[0].register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        measure([case(3, max_new_tokens=1)], *arms)
    finally:
        hook.remove()
    assert len(arms) == 17 and len([n for n in fed if n > 60]) == 1
    assert len(fed) == 18  # and a question for each arm


def test_chunks_shorter_than_the_context_are_read_for_each_arm(measure, ran, monkeypatch):
    monkeypatch.setattr(vestige_runner, "read", lambda *_: pytest.fail("a shared reading cannot evict between chunks"))
    rows = measure(CASES[:1], FULL, SNAP, chunk=32)
    assert [row["chunk"] for row in rows] == [32, 32] and rows[1]["peak_kv_bytes"] < rows[0]["peak_kv_bytes"]


def test_progress_counts_samples_times_arms(measure):
    told: list[tuple[int, int, str]] = []
    measure(CASES, FULL, SNAP, progress=lambda *now: told.append(now))
    assert [now[:2] for now in told] == [(0, 4), (1, 4), (2, 4), (2, 4), (3, 4), (4, 4)]
    assert told[1][2] == f"lamps {SNAP.name}"


def test_a_case_beyond_the_positions_is_refused_before_anything_is_made(measure, out):
    with pytest.raises(
        InputError, match="sample 1 of lamps takes .* tokens, reply included; the model has 512 positions"
    ):
        measure([case(3, max_new_tokens=500)], FULL)
    assert not out.exists()


def test_a_full_disk_keeps_what_is_finished_and_says_how_to_go_on(measure, out, monkeypatch):
    from vestige.bench.results import store

    append, replaced = store.Store.append, store.os.replace
    full = []

    def filling(self: Any, one: dict[str, Any]) -> None:
        if len(self.records) == 1:
            full.append(True)
            self.file.close()
            self.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 - closed by the store
        append(self, one)

    def replace(*paths: Any) -> None:
        if full:
            raise OSError(28, "No space left on device")
        replaced(*paths)

    monkeypatch.setattr(store.Store, "append", filling)
    monkeypatch.setattr(store.os, "replace", replace)
    with pytest.raises(InputError, match="No space left on device; 1 finished samples are kept, go on with --resume"):
        measure(CASES, FULL)
    monkeypatch.undo()
    assert len(records(out)) == 1
    assert [row["n"] for row in measure(CASES, FULL, resume=True)] == [2]


def test_the_model_is_left_as_it_was(measure, chatter):
    model, _ = chatter
    before = model.config._attn_implementation
    measure(CASES[:1], FULL, SNAP)
    assert model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_could_not_be_scored_is_refused_before_anything_runs(measure, out, ran):
    with pytest.raises(InputError, match="names a paragraph, such as 'Paragraph 7'; got 'the seventh'"):
        measure([CASES[0], case(5, metric="retrieval", answer="the seventh")], FULL)
    assert not ran and not out.exists()
