"""Made-up result rows for the tests of the report: no model is run, so numbers may be large in number and exact."""

import math
import random
from typing import Any

FACTS: dict[str, Any] = {
    "split": "test",
    "question_aware": False,
    "model": "smollm2-135m",
    "chunk": None,
    "batch": 4,
    "seed": 0,
    "revision": "0123456789",
    "versions": {"vestige": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
    "device": "cpu, a made-up processor, 2 threads",
    "dtype": "float32",
    "note": None,
}
LAYERS, HEADS, PAIR_BYTES = 30, 3, 2 * 64 * 4
RULER = {"ruler/niah_single_1": 0.95, "ruler/niah_single_2": 0.8, "ruler/vt": 0.55, "ruler/cwe": 0.5}
OWN = [
    ("random", "head", 0.25), ("streaming_llm", "head", 0.3), ("knorm", "head", 0.35), ("keydiff", "head", 0.65),
    ("tova", "head", 0.4), ("snapkv", "head", 0.5), ("keydiff", "model", 0.7), ("snapkv", "model", 0.6),
]  # fmt: skip
PEERS = [
    ("kvpress:KnormPress", 0.33), ("kvpress:KeyDiffPress", 0.64), ("kvpress:TOVAPress", 0.41),
    ("kvpress:SnapKVPress", 0.5), ("kvpress:RandomPress", 0.25), ("kvpress:KVzipPress", 0.95),
]  # fmt: skip


def wilson(score: float, n: int) -> list[float]:
    """Return a 95 % interval."""
    z = 1.96
    middle, room = (score + z * z / 2 / n) / (1 + z * z / n), z / (1 + z * z / n)
    half = room * math.sqrt(score * (1 - score) / n + z * z / 4 / n / n)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def row(task: str, length: int | None, policy: str, budget: str = "1.0", **changes: Any) -> dict[str, Any]:
    """Return one whole row; every field can be changed, and one that is set to ``...`` is missing."""
    kept = float(budget) if "." in budget else 1.0
    n, seen = changes.pop("n", 20), 1900 if length is None else length - 100
    score = changes.pop("score", 0.5)
    full = seen * LAYERS * HEADS
    made = {
        "task": task, "length": length, "policy": policy, "share": "head", "memory": "none", "budget": budget,
        "peer": None, **FACTS, "score": score, "score_ci95": None if score is None else wilson(score, n), "n": n,
        "kept_fraction": kept, "held": kept * full, "full": full, "kv_bytes": kept * full * PAIR_BYTES,
        "peak_kv_bytes": 1.2 * full * PAIR_BYTES, "full_kv_bytes": full * PAIR_BYTES, "memory_bytes": 0,
        "prefill_s": 2.5, "evict_s": 0.1, "decode_ms": 30 + 25 * kept, "parts": [], "turns": [],
        "kept": [[kept * seen] * HEADS for _ in range(LAYERS)],
    }  # fmt: skip
    return {key: value for key, value in (made | changes).items() if value is not ...}


def uneven(kept: float, seen: int, draw: random.Random) -> list[list[float]]:
    """Return what a method kept whose layers and heads compete: ``kept`` of ``seen`` on average."""
    raw = [[math.exp(draw.gauss(0.6 * math.sin(i / 4), 0.5)) for _ in range(HEADS)] for i in range(LAYERS)]
    mean = sum(map(sum, raw)) / LAYERS / HEADS
    return [[min(seen, kept * seen * value / mean) for value in layer] for layer in raw]


def many_rows() -> list[dict[str, Any]]:
    """Return what the committed run gives, about 300 rows, with a niah grid, a dialogue and failed rows."""
    draw = random.Random(3)
    rows = []
    for length, budgets in ((2048, ("0.5", "0.25", "0.1", "0.05")), (1024, ("0.25",))):
        for task, best in RULER.items():
            rows += _arms(task, length, budgets, best, draw)
    failing = [r for r in rows if r["peer"] == "kvpress:KVzipPress" and r["task"] == "ruler/cwe"]
    rows = [r for r in rows if r not in failing]
    rows += [_failed(r, "CUDA out of memory: tried to allocate 2 GiB") for r in failing]
    return rows + niah_rows() + dialogue_rows()


def _arms(task: str, length: int, budgets: tuple[str, ...], best: float, draw: random.Random) -> list[dict[str, Any]]:
    made = [row(task, length, "full", score=best)]
    made += [row(task, length, p, peer=p, share=None, score=best) for p in ("transformers:dynamic",)]
    made += [row(task, length, p, peer=p, share=None, score=best * 0.9, kv_bytes=made[0]["kv_bytes"] * 0.3)
             for p in ("transformers:quantized",)]  # fmt: skip
    for budget in budgets:
        kept = float(budget)
        for policy, share, worth in OWN:
            score = _drawn(best * worth * kept**0.45, 20, draw)
            slack = {"kv_bytes": row(task, length, policy, budget)["kv_bytes"] * draw.uniform(1.02, 1.12)}
            grid = {"kept": uneven(kept, length - 100, draw)} if share == "model" else {}
            made.append(row(task, length, policy, budget, share=share, score=score, **slack, **grid))
        for peer, worth in PEERS:
            n = 10 if "zip" in peer else 20
            score = _drawn(best * worth * kept**0.45, n, draw)
            whole = {"kv_bytes": made[0]["kv_bytes"], "kept_fraction": 1.0, "note": "keys are masked, not freed"}
            made.append(row(task, length, peer, budget, peer=peer, share=None, score=score, n=n, kept=[],
                            **(whole if "zip" in peer else {})))  # fmt: skip
    return made


def _drawn(score: float, n: int, draw: random.Random) -> float:
    return sum(draw.random() < score for _ in range(n)) / n


def _failed(like: dict[str, Any], error: str) -> dict[str, Any]:
    kept = ("task", "length", "policy", "share", "memory", "budget", "peer", *FACTS)
    return {key: like[key] for key in kept} | {"score": None, "score_ci95": None, "n": 0, "error": error}


def niah_rows(lengths: tuple[int, ...] = (512, 1024, 2048)) -> list[dict[str, Any]]:
    """Return a grid of depths and lengths for three methods."""
    made = []
    for length in lengths:
        for policy, budget, worth in (("full", "1.0", 0.95), ("snapkv", "0.25", 0.5), ("snapkv", "0.1", 0.3),
                                      ("keydiff", "0.25", 0.7), ("keydiff", "0.1", 0.4)):  # fmt: skip
            depths = [0.0, 0.25, 0.5, 0.75, 1.0]
            scores = [min(1.0, worth * (1 + abs(d - 0.5)) * (512 / length) ** 0.2) for d in depths]
            parts = [{"tags": {"depth": d}, "score": s, "score_ci95": wilson(s, 5), "n": 5}
                     for d, s in zip(depths, scores, strict=True)]  # fmt: skip
            made.append(row("niah", length, policy, budget, score=sum(scores) / 5, n=25, parts=parts))
    return made


def dialogue_rows() -> list[dict[str, Any]]:
    """Return conversations of five turns for three methods and two budgets."""
    made = []
    for policy, share, budget, fade in (("full", "head", "1.0", 1.0), ("snapkv", "head", "0.25", 0.8),
                                        ("snapkv", "model", "0.25", 0.85), ("keydiff", "head", "0.25", 0.9),
                                        ("random", "head", "0.25", 0.6), ("snapkv", "head", "0.1", 0.6),
                                        ("keydiff", "head", "0.1", 0.7)):  # fmt: skip
        turns = [
            {"turn": t, "score": 0.9 * fade**t, "score_ci95": wilson(0.9 * fade**t, 20), "n": 20} for t in range(5)
        ]
        score = sum(turn["score"] for turn in turns) / 5
        made.append(row("dialogue", 2048, policy, budget, share=share, score=score, turns=turns))
    return made


def speed_rows() -> list[dict[str, Any]]:
    """Return rows as ``bench speed`` makes them."""
    made = []
    for batch in (1, 4):
        for length in (1000, 4000, 16000):
            for policy, budget in (("full", "1.0"), ("snapkv", "0.05"), ("snapkv", "0.25"), ("keydiff", "0.05")):
                floor, full = 20.0 * batch**0.5, (20 + length * batch / 400) * batch**0.5
                ms = floor + (full - floor) * float(budget) * 1.05
                made.append({
                    "length": length, "batch": batch, "policy": policy, "budget": budget, "share": "head",
                    "decode_ms": ms, "floor_ms": floor, "full_decode_ms": full, "decode_over_floor": ms / floor,
                    "decode_speedup": full / ms, "prefill_s": length / 900, "full_prefill_s": length / 1000,
                    "prefill_overhead": 1.11, "evict_s": 0.1, "kv_bytes": 1e6 * float(budget), "peak_kv_bytes": 2e6,
                    "full_kv_bytes": 1e6, "model": "smollm2-135m", "random_weights": length > 8192,
                })  # fmt: skip
    return made
