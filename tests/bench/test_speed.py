"""bench speed beside peers: rows, batches, failures, and what is kept for the report."""

import json

import pytest
import torch

from vestige.bench import speed as speeds
from vestige.bench import timing
from vestige.bench.methods import peers
from vestige.bench.speed import SpeedConfig, speed
from vestige.errors import InputError, PolicyError
from vestige.testing import tiny

SHORT = {"policies": ("streaming_llm",), "budgets": ("40",), "blocks": 1, "prefills": 1, "chunk": 32}
RATIOS = {
    "decode_over_floor": ("decode_ms", "floor_ms"),
    "decode_speedup": ("full_decode_ms", "decode_ms"),
    "prefill_overhead": ("prefill_s", "full_prefill_s"),
}


def test_a_peer_is_timed_beside_ours_at_every_batch():
    model = tiny("llama", max_position_embeddings=512)
    rows = speed(SpeedConfig(lengths=(60,), batches=(1, 3), peers=("transformers:dynamic",), **SHORT), model)
    assert [(row["batch"], row["policy"], row["peer"]) for row in rows] == [
        (batch, name, peer)
        for batch in (1, 3)
        for name, peer in (("streaming_llm", None), ("transformers:dynamic", "transformers:dynamic"))
    ]
    for row in rows:
        for ratio, (above, below) in RATIOS.items():
            assert row[ratio] == pytest.approx(row[above] / row[below])
    pair_bytes, rows_held = 2 * 16 * 4, 6
    for batch, (own, other) in ((1, rows[:2]), (3, rows[2:])):
        assert own["held"] == batch * rows_held * 40 and own["kv_bytes"] == own["held"] * (pair_bytes + 4)
        assert other["held"] == batch * rows_held * 60 and other["kv_bytes"] == other["held"] * pair_bytes
        assert other["kept_fraction"] == 1.0 and other["budget"] == "1.0"
    assert {row["device"] for row in rows} == {rows[0]["device"]} and rows[0]["versions"]["torch"] == torch.__version__


def test_a_memory_is_timed_beside_none_and_its_bytes_count():
    model = tiny("llama", max_position_embeddings=512)
    config = SpeedConfig(lengths=(60,), **SHORT | {"policies": ("full", "streaming_llm")}, memories=("none", "moments"))
    rows = speed(config, model)
    named = [(row["policy"], row["memory"]) for row in rows]
    assert named == [("full", "none"), ("streaming_llm", "none"), ("streaming_llm", "moments")]
    assert rows[1]["memory_bytes"] == 0 < rows[2]["memory_bytes"]
    assert rows[2]["kv_bytes"] == rows[1]["kv_bytes"] + rows[2]["memory_bytes"]
    with pytest.raises(PolicyError, match="momens"):
        SpeedConfig(memories=("momens",))


def test_arms_decode_a_few_tokens_in_turn_two_intervals_each(monkeypatch):
    take, turns, told = timing._Decoding.take_turn, [], []

    def watched(block, model):
        seen = block.cache.get_seq_length()
        take(block, model)
        turns.append((block, block.cache.get_seq_length() - seen))

    monkeypatch.setattr("vestige.bench.timing._Decoding.take_turn", watched)
    config = SpeedConfig(lengths=(60,), **SHORT | {"policies": tuple(f"streaming_llm(every={n})" for n in (5, 11))})
    speed(config, tiny("llama", max_position_embeddings=512), progress=lambda *figures: told.append(figures))
    warm, *rounds = [[(id(block), steps) for block, steps in turns[i : i + 4]] for i in (0, 4, 8, 12)]
    assert [steps for _, steps in warm] == [8] * 4
    assert all({block for block, _ in one} == {block for block, _ in rounds[0]} for one in rounds)
    assert len({tuple(block for block, _ in one) for one in rounds}) > 1, "in another order"
    steps = [sorted(steps for _, steps in one) for one in rounds]
    assert steps == [[8, 8, 8, 8], [2, 8, 8, 8], [0, 6, 6, 6]]  # floor and full go as long as the longest
    assert told == [(i, 4 + 3) for i in range(1, 8)]


class Broken(peers.Peer):
    """A peer that always fails."""

    runs = 0

    def run(self, job):
        self.runs += 1
        raise peers.PeerError("kvpress died with status 1")

    def close(self) -> None: ...


def test_a_peer_that_fails_is_a_row_with_its_reason_and_is_asked_once(monkeypatch):
    broken = Broken()
    monkeypatch.setattr(speeds.peers, "open_peer", lambda name, model: broken)
    config = SpeedConfig(lengths=(60,), peers=("kvpress:SnapKVPress",), **SHORT | {"prefills": 3})
    own, other = speed(config, tiny("llama", max_position_embeddings=512))
    assert own["decode_ms"] > 0
    assert other["error"] == "kvpress died with status 1" and other["peer"] == "kvpress:SnapKVPress"
    assert "decode_ms" not in other and broken.runs == 1


def test_no_peer_runs_on_stretched_positions():
    model = tiny("llama", max_position_embeddings=64)
    config = SpeedConfig(lengths=(80,), peers=("transformers:dynamic",), **SHORT)
    own, other = speed(config, model)
    assert own["random_weights"] and "no peer has" in other["error"]


def test_an_unknown_peer_is_refused_before_anything_is_loaded():
    with pytest.raises(InputError, match="unknown peer 'kvpresss:SnapKVPress'"):
        SpeedConfig(peers=("kvpresss:SnapKVPress",))


def test_rows_are_kept_for_the_report(vestige, folders, place):
    words = [
        "--policy",
        "streaming_llm",
        "--budget",
        "40",
        "--length",
        "60",
        "--blocks",
        "1",
        "--prefills",
        "1",
        "--chunk",
        "32",
        "--json",
        "--out",
        "timed",
    ]
    out = vestige("bench", "speed", "--model", folders.chat, *words)
    assert out.code == 0, out.err
    kept = json.loads((place / "timed" / "speed.json").read_text())
    assert kept["rows"] == out.row["rows"]
    assert "exists and is not empty" in vestige("bench", "speed", "--model", folders.chat, *words).complaint()
