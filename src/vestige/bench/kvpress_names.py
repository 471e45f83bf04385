"""Result folders under kvpress's naming: ``predictions.csv``, ``metrics.json`` and ``config.yaml`` for each arm.

What can be compared with kvpress's leaderboard, and what cannot:

* Comparable: RULER's metrics (string match in percent, rounded to two digits), per task and with all thirteen tasks of
  one arm and length in one folder; LongBench's scores in percent; the measured compression ratio.
* Not comparable without care: our samples are drawn by our generators, not taken from kvpress's data sets, and are
  fewer; replies may end earlier. LongBench prompts are ours unless a row's tags say otherwise. ``needle_in_haystack``
  is scored there by ROUGE-1 times ten, here by string match in percent. LongBench-E has one number here, not one per
  range of lengths. ``dialogue``, ``cases`` and others do not exist there, and have string-match-like percentages.
* ``compression_ratio`` is measured: 1 - kept fraction, the mean over the tasks of a folder. kvpress writes the ratio
  that was asked for, also where its press frees nothing; ours has that under ``vestige.nominal_compression_ratio``.
* Our methods are called ``vestige_<policy>_<share>``, so that nobody takes them for kvpress's; ``full`` is
  ``no_press``, and kvpress's own presses have the names of its registry.

Source: kvpress's ``evaluation/evaluate.py`` and ``evaluate_registry.py``. Differs: columns
``index``, ``turn`` and ``score`` and the block ``vestige`` of the configuration are added; columns
have a fixed order.
"""

import csv
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vestige.errors import InputError

FOLDER = "kvpress"
_DATASETS = {"niah": "needle_in_haystack"}
_PRESSES = {
    "adakvpress": "adakv_snapkv",
    "chunkkvpress": "chunkkv",
    "compactorpress": "compactor",
    "curpress": "cur",
    "duoattentionpress": "duo_attention",
    "expectedattentionpress": "expected_attention",
    "finchpress": "finch",
    "keydiffpress": "keydiff",
    "knormpress": "knorm",
    "kvzippress": "kvzip",
    "lagkvpress": "lagkv",
    "observedattentionpress": "observed_attention",
    "pyramidkvpress": "pyramidkv",
    "qfilterpress": "qfilter",
    "randompress": "random",
    "snapkvpress": "snapkv",
    "streamingllmpress": "streaming_llm",
    "tovapress": "tova",
}
"""Names that kvpress's registry gives its presses."""
_ARM = ("policy", "share", "memory", "budget", "peer")
_COLUMNS = ("question", "answer_prefix", "answer", "task", "max_new_tokens", "predicted_answer", "compression_ratio")
_OURS = ("index", "turn", "score")

Row = Mapping[str, Any]
Record = Mapping[str, Any]
Key = tuple[str, str | None, int | None, tuple[Any, ...]]


def export(folder: Path, rows: Iterable[Row], records: Iterable[Record], config: Mapping[str, Any]) -> list[Path]:
    """Write a folder below ``folder/kvpress`` for each (data set, length, arm) that has records.

    ``folder/kvpress`` is replaced as a whole, so that a resumed run leaves nothing stale.

    Args:
        folder: The result folder.
        rows: Its rows; those without a score, or without records, are left out.
        records: Its records.
        config: What the run was given: ``model, device, dtype, seed, question_aware`` where rows do not say.

    Returns:
        The folders, sorted.

    Raises:
        InputError: They cannot be written.
    """
    rows_of: dict[Key, list[Row]] = {}
    for row in rows:
        if row.get("score") is not None:
            rows_of.setdefault(_key(row, row), []).append(row)
    records_of: dict[Key, list[Record]] = {}
    for record in records:
        records_of.setdefault(_key(record, record["arm"]), []).append(record)
    place, work = folder / FOLDER, folder / f".{FOLDER}.new"
    try:
        shutil.rmtree(work, ignore_errors=True)
        names: list[Path] = []
        for key in sorted(rows_of, key=repr):
            if key in records_of:
                facts = _facts(key, rows_of[key], config)
                name = _free(Path(folder_name(facts)), names)
                names.append(name)
                _write(work / name, facts, rows_of[key], records_of[key])
        shutil.rmtree(place, ignore_errors=True)
        if names:
            work.rename(place)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise InputError(f"cannot write {place}: {error.strerror}") from None
    return sorted(place / name for name in names)


def folder_name(facts: Mapping[str, Any]) -> str:
    """Return the name that kvpress's evaluation gives the folder of a configuration."""
    parts = [facts["dataset"], facts["data_dir"] or "", str(facts["model"]).replace("/", "--"), facts["press_name"]]
    parts.append(f"{facts['compression_ratio']:.2f}")
    if facts["max_context_length"] is not None:
        parts.append(f"max_context{facts['max_context_length']}")
    if facts["compress_questions"]:
        parts.append("compressed_questions")
    return re.sub(r"[^\w.,+=-]", "-", "__".join(filter(None, parts))).lstrip(".")


def press_name(arm: Mapping[str, Any]) -> str:
    """Return kvpress's name for its own press and for no press; others say whose they are."""
    peer = arm.get("peer")
    if peer is not None:
        package, _, name = str(peer).rpartition(":")
        if package == "kvpress":
            return _PRESSES.get(name.lower(), name)
        return f"{package}_{name}".strip("_")
    if arm["policy"] == "full":
        return "no_press"
    memory = arm.get("memory")
    words = ("vestige", arm["policy"], arm.get("share"), None if memory == "none" else memory)
    return "_".join(str(word) for word in words if word)


def nominal_ratio(budget: object) -> float | None:
    """Return the ratio that a budget asks for: 0.75 for "0.25"; None for tokens and bytes."""
    try:
        return round(1 - float(str(budget)), 6) if "." in str(budget) else None
    except ValueError:
        return None


def _key(item: Mapping[str, Any], arm: Mapping[str, Any]) -> Key:
    """Return what shares a folder: RULER's tasks do, others stand alone."""
    group, _, part = str(item["task"]).partition("/")
    length = item.get("length")
    inner = None if group == "ruler" else (part or None)
    return group, inner, length if isinstance(length, int) else None, tuple(arm.get(name) for name in _ARM)


def _facts(key: Key, rows: Sequence[Row], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration in kvpress's words."""
    group, part, length, arm = key
    row = {**config, **{name: value for name, value in rows[0].items() if value is not None}}
    dataset = _DATASETS.get(group, group)
    by_length = length is not None and not group.startswith("longbench")
    inside = [part, str(length) if by_length and dataset != "needle_in_haystack" else None]
    kept = [float(r["kept_fraction"]) for r in rows if r.get("kept_fraction") is not None]
    named = dict(zip(_ARM, arm, strict=True))
    measured = round(1 - sum(kept) / len(kept), 6) if kept else 0.0
    return {
        "dataset": dataset,
        "data_dir": "_".join(filter(None, inside)) or None,
        "model": row.get("model", "unknown"),
        "device": row.get("device"),
        "press_name": press_name(named),
        "compression_ratio": measured,
        "key_channel_compression_ratio": None,
        "fraction": 1.0,
        "max_new_tokens": None,
        "max_context_length": length if dataset == "needle_in_haystack" else None,
        "compress_questions": bool(row.get("question_aware", False)),
        "needle_depth": None,
        "compression_interval": None,
        "target_size": None,
        "hidden_states_buffer_size": None,
        "output_dir": f"./{FOLDER}",
        "log_level": "INFO",
        "model_kwargs": {"dtype": row.get("dtype")},
        "press_init_command": None,
        "seed": row.get("seed"),
        "vestige": {
            **named,
            "length": length,
            "nominal_compression_ratio": nominal_ratio(named["budget"]),
            "kept_fraction": {str(r["task"]): r.get("kept_fraction") for r in rows},
            "kv_bytes": {str(r["task"]): r.get("kv_bytes") for r in rows},
            "full_kv_bytes": {str(r["task"]): r.get("full_kv_bytes") for r in rows},
            "split": row.get("split"),
            "revision": row.get("revision"),
            "versions": row.get("versions"),
        },
    }


def _metrics(dataset: str, rows: Sequence[Row]) -> Any:
    """Return scores as kvpress nests them: RULER by task, LongBench a number in percent, v2 one in 0..1."""
    percent = {_task(row): round(100 * float(row["score"]), 2) for row in rows}
    if dataset == "longbench-v2":
        return sum(float(row["score"]) for row in rows) / len(rows)
    if dataset.startswith("longbench"):
        return next(iter(percent.values()))
    return {task: {"string_match": score} for task, score in sorted(percent.items())}


def _task(item: Mapping[str, Any]) -> str:
    """Return the task as kvpress writes it: without the group."""
    group, _, part = str(item["task"]).partition("/")
    return part or group


def _write(folder: Path, facts: Mapping[str, Any], rows: Sequence[Row], records: Sequence[Record]) -> None:
    import yaml  # type: ignore[import-untyped]

    folder.mkdir(parents=True)
    # as kvpress's longbench has it: one column of all answers
    columns = [("answers" if facts["dataset"].startswith("longbench") and c == "answer" else c) for c in _COLUMNS]
    ordered = sorted(records, key=lambda record: (str(record["task"]), record["index"]))
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, *_OURS])
        for record in ordered:
            writer.writerows(_predictions(record))
    (folder / "metrics.json").write_text(json.dumps(_metrics(facts["dataset"], rows), indent=4) + "\n")
    with (folder / "config.yaml").open("w", encoding="utf-8") as file:
        yaml.safe_dump(_plain(facts), file, default_flow_style=False, indent=2, sort_keys=False, allow_unicode=True)


def _predictions(record: Record) -> list[list[Any]]:
    """Return a line for each turn, in the order of the columns."""
    kept = record.get("kept_fraction")
    ratio = None if kept is None else round(1 - float(kept), 6)
    return [
        [
            turn["question"], turn["answer_prefix"], repr(list(turn["answers"])), _task(record), turn["max_new_tokens"],
            turn["prediction"], ratio, record["index"], i, turn["score"],
        ]
        for i, turn in enumerate(record["turns"])
    ]  # fmt: skip


def _free(name: Path, taken: Sequence[Path]) -> Path:
    """Return the name, or a numbered folder inside it if two arms measure the same ratio, as kvpress does."""
    tries = [name, *(name / str(i) for i in range(1, len(taken) + 2))]
    return next(each for each in tries if each not in taken)


def _plain(value: Any) -> Any:
    """Return nested mappings and sequences as dicts and lists, which YAML writes without tags."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
