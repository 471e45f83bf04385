import ast
import csv
import json
from typing import Any

import pytest
import yaml

from bench_report_rows import row
from vestige.bench.kvpress_names import export, folder_name, nominal_ratio, press_name

ARM = ("policy", "share", "memory", "budget", "peer")


def record(of: dict[str, Any], index: int = 0, **turn: Any) -> dict[str, Any]:
    """Return a record of a row's arm with one turn."""
    reply = {"question": "Which?", "answer_prefix": "It is", "answers": ["7", "8"], "prediction": " 7, not 9",
             "metric": "all", "max_new_tokens": 16, "score": 0.5}  # fmt: skip
    arm = {name: of[name] for name in ARM}
    return {"task": of["task"], "length": of["length"], "index": index, "tags": {}, "arm": arm, "turns": [reply | turn],
            "score": 0.5, "kept_fraction": of["kept_fraction"]}  # fmt: skip


def lines(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_ruler_tasks_of_one_arm_share_a_folder_named_as_kvpress_names_it(tmp_path):
    rows = [row("ruler/vt", 2048, "kvpress:SnapKVPress", "0.25", peer="kvpress:SnapKVPress", share=None, score=0.5,
                model="HuggingFaceTB/SmolLM2-135M"),
            row("ruler/cwe", 2048, "kvpress:SnapKVPress", "0.25", peer="kvpress:SnapKVPress", share=None, score=0.95,
                model="HuggingFaceTB/SmolLM2-135M")]  # fmt: skip
    (folder,) = export(tmp_path, rows, [record(r) for r in rows], {})
    assert folder == tmp_path / "kvpress" / "ruler__2048__HuggingFaceTB--SmolLM2-135M__snapkv__0.75"
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "metrics.json", "predictions.csv"]
    assert json.loads((folder / "metrics.json").read_text()) == {
        "cwe": {"string_match": 95.0},
        "vt": {"string_match": 50.0},
    }


def test_predictions_have_kvpress_columns_and_no_context(tmp_path):
    line = row("ruler/vt", 512, "snapkv", "0.25")
    (folder,) = export(tmp_path, [line], [record(line, 1, prediction='a,"b"\n<c>'), record(line, 0)], {})
    first, second = lines(folder / "predictions.csv")
    assert {"question", "answer_prefix", "answer", "task", "max_new_tokens", "predicted_answer"} <= set(first)
    assert "context" not in first
    assert (first["index"], second["index"]) == ("0", "1")
    assert first["task"] == "vt" and ast.literal_eval(first["answer"]) == ["7", "8"]
    assert first["predicted_answer"] == " 7, not 9" and second["predicted_answer"] == 'a,"b"\n<c>'
    assert first["compression_ratio"] == "0.75"


def test_the_ratio_is_measured_and_the_nominal_one_stands_beside_it(tmp_path):
    peer = "kvpress:KVzipPress"
    line = row("ruler/vt", 512, peer, "0.25", peer=peer, share=None, kept_fraction=1.0)
    (folder,) = export(tmp_path, [line], [record(line)], {"seed": 3})
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert folder.name.endswith("__kvzip__0.00")
    assert config["compression_ratio"] == 0.0 and config["vestige"]["nominal_compression_ratio"] == 0.75
    assert config["dataset"] == "ruler" and config["data_dir"] == "512" and config["press_name"] == "kvzip"
    assert config["seed"] == 0 and config["compress_questions"] is False
    assert config["vestige"]["versions"]["torch"] == "2.13.0"


def test_a_question_aware_run_says_so_in_its_name(tmp_path):
    line = row("ruler/vt", 512, "snapkv", "0.25", question_aware=True)
    (folder,) = export(tmp_path, [line], [record(line)], {})
    assert folder.name == "ruler__512__smollm2-135m__vestige_snapkv_head__0.75__compressed_questions"


@pytest.mark.parametrize(
    ("task", "length", "name", "metrics"),
    [
        ("longbench/multi_news", None, "longbench__multi_news__smollm2-135m__vestige_snapkv_head__0.75", 12.35),
        ("longbench-v2", None, "longbench-v2__smollm2-135m__vestige_snapkv_head__0.75", 0.12345),
        ("niah", 512, "needle_in_haystack__smollm2-135m__vestige_snapkv_head__0.75__max_context512",
         {"niah": {"string_match": 12.35}}),
        ("dialogue", 512, "dialogue__512__smollm2-135m__vestige_snapkv_head__0.75",
         {"dialogue": {"string_match": 12.35}}),
    ],
)  # fmt: skip
def test_other_data_sets_keep_their_own_names_and_metrics(tmp_path, task, length, name, metrics):
    line = row(task, length, "snapkv", "0.25", score=0.12345)
    (folder,) = export(tmp_path, [line], [record(line)], {})
    assert folder.name == name
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert ("answers" in lines(folder / "predictions.csv")[0]) == task.startswith("longbench")


def test_every_turn_of_a_dialogue_is_a_line(tmp_path):
    line = row("dialogue", 512, "full")
    talk = record(line)
    talk["turns"] *= 3
    (folder,) = export(tmp_path, [line], [talk], {})
    assert [found["turn"] for found in lines(folder / "predictions.csv")] == ["0", "1", "2"]
    assert folder.name == "dialogue__512__smollm2-135m__no_press__0.00"


def test_rows_that_failed_or_lack_records_are_left_out(tmp_path):
    rows = [row("ruler/vt", 512, "snapkv", "0.25", score=None), row("ruler/vt", 512, "tova", "0.25")]
    assert export(tmp_path, rows, [record(rows[0])], {}) == []
    assert list(tmp_path.iterdir()) == []


def test_arms_of_equal_ratio_get_numbers_and_a_second_export_replaces_the_first(tmp_path):
    rows = [row("ruler/vt", 512, "snapkv", budget, kept_fraction=kept) for budget, kept in
            (("0.25", 0.251), ("128", 0.249))]  # fmt: skip
    folders = export(tmp_path, rows, [record(r) for r in rows], {})
    assert [str(f.relative_to(tmp_path / "kvpress")) for f in folders] == [
        "ruler__512__smollm2-135m__vestige_snapkv_head__0.75",
        "ruler__512__smollm2-135m__vestige_snapkv_head__0.75/1",
    ]
    (left,) = export(tmp_path, rows[:1], [record(rows[0])], {})
    assert [p.name for p in (tmp_path / "kvpress").iterdir()] == [left.name]
    assert not (left / "1").exists()


def test_names_from_results_cannot_leave_the_folder(tmp_path):
    line = row("ruler/vt", 512, "snapkv", "0.25", model="../../etc/passwd\n")
    (folder,) = export(tmp_path, [line], [record(line)], {})
    assert folder.parent == tmp_path / "kvpress"
    line = row("../x/../../y", 512, "snapkv", "0.25")
    (folder,) = export(tmp_path, [line], [record(line)], {})
    assert folder.parent == tmp_path / "kvpress"


@pytest.mark.parametrize(
    ("arm", "name"),
    [
        ({"policy": "full"}, "no_press"),
        ({"policy": "snapkv", "share": "model", "memory": "none"}, "vestige_snapkv_model"),
        ({"policy": "snapkv", "share": "head", "memory": "moments"}, "vestige_snapkv_head_moments"),
        ({"policy": "x", "peer": "kvpress:StreamingLLMPress"}, "streaming_llm"),
        ({"policy": "x", "peer": "kvpress:NewPress"}, "NewPress"),
        ({"policy": "x", "peer": "transformers:quantized"}, "transformers_quantized"),
    ],
)
def test_press_names(arm, name):
    assert press_name(arm) == name


@pytest.mark.parametrize(
    ("budget", "ratio"), [("0.25", 0.75), ("1.0", 0.0), ("512", None), ("64MB", None), (None, None)]
)
def test_only_a_fraction_has_a_nominal_ratio(budget, ratio):
    assert nominal_ratio(budget) == ratio


def test_two_exports_give_the_same_bytes(tmp_path):
    line = row("ruler/vt", 512, "snapkv", "0.25")
    first = {p.name: p.read_bytes() for p in export(tmp_path / ".", [line], [record(line)], {})[0].iterdir()}
    again = {p.name: p.read_bytes() for p in export(tmp_path / ".", [line], [record(line)], {})[0].iterdir()}
    assert first == again


def test_a_folder_name_has_kvpress_parts_in_its_order():
    facts = {"dataset": "ruler", "data_dir": "4096", "model": "a/b", "press_name": "knorm", "compression_ratio": 0.5,
             "max_context_length": 9, "compress_questions": True}  # fmt: skip
    assert folder_name(facts) == "ruler__4096__a--b__knorm__0.50__max_context9__compressed_questions"
