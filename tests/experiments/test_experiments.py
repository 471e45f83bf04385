"""Published runs say what they promise, and take only what was chosen on dev."""

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest

from experiments import __main__ as command
from experiments import (
    ablations,
    bench,
    comparison,
    distractor_attention,
    erase,
    laprox,
    memory,
    retention,
)
from experiments.runner import choose_folder, update_rows
from vestige.bench.config import BenchConfig
from vestige.bench.erasing.aggregate import aggregate
from vestige.bench.erasing.tasks import TASKS
from vestige.bench.methods import vestige_runner
from vestige.bench.results.aggregate import Record
from vestige.erasers import ERASERS
from vestige.policies import POLICIES
from vestige.testing import tiny


def test_the_comparison_runs_every_method_beside_its_press_on_the_test_split():
    config = bench.make_comparison(2048)
    assert config.split == "test" and config.samples == 20 and config.lengths == (2048,) and config.answer_room == 16
    own = {(arm.policy, arm.share, arm.budget) for arm in config.methods if arm.peer is None}
    budgets = ("0.5", "0.25", "0.1", "0.05")
    methods = ("random", "streaming_llm", "knorm", "keydiff", "tova", "snapkv")
    expected = {("full", "head", "1.0")} | {(name, "head", budget) for name in methods for budget in budgets}
    expected |= {(name, "model", budget) for name in ("keydiff", "snapkv") for budget in budgets}
    assert own == expected
    peers = {(arm.policy, arm.budget, arm.samples) for arm in config.methods if arm.peer is not None}
    presses = ("Random", "StreamingLLM", "Knorm", "KeyDiff", "TOVA", "SnapKV")
    wanted = {(f"kvpress:{name}Press", budget, None) for name in presses for budget in budgets}
    wanted |= {("kvpress:KVzipPress", budget, 10) for budget in budgets}
    assert peers == wanted | {("transformers:dynamic", "1.0", None), ("transformers:quantized", "1.0", None)}


def test_the_shorter_texts_are_run_at_one_budget():
    assert {arm.budget for arm in bench.make_comparison(1024).methods} == {"1.0", "0.25"}


def test_tasks_are_chosen_by_the_full_cache_alone_on_dev_from_candidates_that_have_them():
    config = bench.make_task_choice(2048)
    assert config.split == "dev" and [arm.policy for arm in config.methods] == ["full"]
    assert set(bench.TASKS) <= set(config.tasks) and len(bench.TASKS) <= 4


# LaProx.


def test_laprox_meets_the_field_with_equal_pooling_on_the_test_split():
    aware = laprox.make_parts()["aware"].config
    assert aware.split == "test" and aware.question_aware and aware.samples == 20 and aware.lengths == (2048,)
    pooled = {arm.policy for arm in aware.methods if "causal" in arm.policy}
    methods = ("laprox", "snapkv", "adakv", "pyramidkv", "criticalkv")
    assert pooled == {f"{name}(kernel=41, causal=True)" for name in methods}
    assert {"snapkv(kernel=7)", "laprox(kernel=7)"} <= {arm.policy for arm in aware.methods}
    assert {"full", "random", "streaming_llm"} <= {arm.policy for arm in aware.methods}
    assert {arm.budget for arm in aware.methods} == {"1.0", "0.25", "0.1", "0.05"}


def test_without_the_question_kvzip_and_keydiff_are_there_too():
    agnostic = laprox.make_parts()["agnostic"].config
    assert not agnostic.question_aware
    assert {"kvzip", "keydiff"} <= {arm.policy for arm in agnostic.methods}


def test_every_part_can_be_run_on_the_dev_split():
    assert {part.config.split for part in laprox.make_parts(split="dev").values()} == {"dev"}


def scored(policy: str, budget: str, *scores: float) -> list[dict]:
    arm = {"policy": policy, "budget": budget}
    return [{"task": "t", "index": i, "score": score, "arm": arm} for i, score in enumerate(scores)]


def test_a_loss_is_against_the_full_cache_on_the_same_samples_and_as_a_share_of_snapkvs():
    records = scored("full", "1.0", 1, 1, 1, 0) + scored(laprox.RIVAL, "0.1", 0, 0, 1, 0)
    records += scored("laprox", "0.1", 1, 0, 1)  # the last one is still to come
    rows = {row["policy"]: row for row in laprox.measure_losses(records)}
    assert set(rows) == {laprox.RIVAL, "laprox"}
    assert (rows[laprox.RIVAL]["loss"], rows[laprox.RIVAL]["of_snapkv"]) == (0.5, 1.0)
    assert rows["laprox"]["n"] == 3
    assert rows["laprox"]["loss"] == 1 / 3 and rows["laprox"]["of_snapkv"] == 0.5
    low, high = rows["laprox"]["of_snapkv_ci95"]
    assert 0 <= low < 0.5 <= high <= 1


def test_nothing_is_said_of_a_share_of_no_loss():
    records = scored("full", "1.0", 1, 1) + scored(laprox.RIVAL, "0.1", 1, 1)
    assert laprox.measure_losses(records)[0]["of_snapkv"] is None


def test_a_picture_for_each_budget_names_every_method_and_its_loss():
    records = scored("full", "1.0", 1, 1, 1) + scored(laprox.RIVAL, "0.1", 0, 0, 1) + scored("laprox", "0.1", 1, 1, 0)
    (picture,) = laprox.draw_scores(laprox.measure_losses(records), "some model, aware").values()
    for said in ("some model, aware, budget 0.1", "laprox", "snapkv", "loses +0.33", "loses +0.67"):
        assert said in picture


# The command.


def test_experiments_are_listed_and_each_has_its_options(capsys):
    command.main([])
    listed = capsys.readouterr().out
    for name in command.EXPERIMENTS:
        assert f"\n{name} " in listed
        with pytest.raises(SystemExit) as done:
            command.main([name, "--help"])
        assert done.value.code == 0 and "--out" in capsys.readouterr().out


def test_an_unknown_experiment_is_one_line_with_the_names_there_are(capsys):
    with pytest.raises(SystemExit) as done:
        command.main(["lapro"])
    said = capsys.readouterr().err
    assert done.value.code == 2 and said.count("\n") == 1 and "did you mean 'laprox'?" in said and "erase-speed" in said


def test_dev_runs_go_to_a_folder_of_their_own(tmp_path):
    assert choose_folder(None, "dilution", results="retention") == Path("results/retention")
    assert choose_folder(None, "dilution", results="retention", dev=True) == Path("out/dilution-dev")
    assert choose_folder(tmp_path, "bench", dev=True) == tmp_path


def test_rows_are_kept_where_there_are_no_samples(tmp_path):
    file = tmp_path / "rows.json"
    assert update_rows(file, []) == [] and not file.exists()
    assert update_rows(file, [{"n": 1}]) == update_rows(file, []) == [{"n": 1}]


# Spans.


def test_a_span_is_found_among_tokens_that_cut_words():
    words = ("the ", "co", "de ", "is 7", "31", ".")
    assert distractor_attention.find_span(words, "code") == range(1, 3)
    assert distractor_attention.find_span(words, "731") == range(3, 5)
    assert distractor_attention.find_span(words, "nothing") == range(0)


# Memories.


def test_a_memory_is_compared_at_equal_pairs_and_at_equal_bytes():
    arms = [arm for arm in memory.make_comparison(4096, aware=True).methods if arm.policy != "full"]
    found = {(arm.memory, arm.budget) for arm in arms}
    assert {("none", "409"), ("none", "204"), ("moments", "409"), ("moments", "375"), ("moments", "204")} <= found
    assert memory.count_memory_pairs("moments") == 34 and memory.count_memory_pairs("centroids") == 17


def test_memories_are_tried_with_and_without_the_question_on_long_contexts():
    assert memory.LENGTHS == (4096, 7168, 8192)
    assert memory.make_comparison(8192, aware=True).question_aware
    assert not memory.make_comparison(7168, aware=False).question_aware
    assert memory.make_comparison(4096, aware=False).split == "test"


def remembered(policy: str, name: str, budget: int, *scores: float) -> list[dict]:
    arm = {"policy": policy, "memory": name, "budget": str(budget)}
    return [{"task": "t", "length": 4096, "index": i, "score": score, "arm": arm} for i, score in enumerate(scores)]


def test_a_gain_is_beside_the_same_policy_at_equal_pairs_and_at_equal_bytes(tmp_path):
    (policy,) = memory.AWARE[4096]
    records = remembered(policy, "none", 409, 0, 1, 0) + remembered(policy, "moments", 409, 1, 1, 0)
    records += remembered(policy, "moments", 409 - 34, 0, 0, 0) + remembered("full", "none", 4096, 1, 1, 1)
    rows = {(row["equal"], row["policy"]): row for row in memory.measure_gains(records)}
    assert set(rows) == {(equal, whose) for equal in ("pairs", "bytes") for whose in (policy, "all")}
    assert rows["pairs", policy]["gain"] == rows["pairs", "all"]["gain"] == 1 / 3
    assert rows["bytes", policy]["gain"] == -1 / 3 and rows["bytes", policy]["n"] == 3
    part = tmp_path / "aware" / "4096"
    part.mkdir(parents=True)
    (part / "samples.jsonl").write_text("\n".join(map(json.dumps, records)))
    memory.summarize(tmp_path)
    assert "| all | 0.1 | bytes | 3 | 0.33 | -0.33 (-1.00 to +0.00) |" in (tmp_path / "gains.md").read_text()
    assert len(json.loads((tmp_path / "gains.json").read_text())) == 4


# Erasing.


def test_every_eraser_meets_every_task_on_the_test_split(tmp_path):
    (tmp_path / "qa.json").write_text("{}")
    parts = erase.make_parts(qa=tmp_path / "qa.json")
    assert {config.split for config in parts.values()} == {"test"}
    assert {task for config in parts.values() for task in config.tasks} == set(TASKS)
    lengths = {length for name in ("needles", "needles-long") for length in parts[name].lengths}
    assert lengths == {1024, 2048, 4096, 8192} and parts["needles"].samples == 25  # of each of two kinds
    assert parts["tasks"].samples == 50 and parts["questions"].samples == 400 and parts["questions"].kept_only
    assert {name for name in ERASERS if name not in ("noop", "recompute")} <= {*parts["tasks"].methods}
    for name in ("needles-evicted", "questions-evicted"):
        assert (parts[name].policy, parts[name].budget, parts[name].lengths) == ("kvzip", "0.25", (2048,))
    assert not any("questions" in name for name in erase.make_parts())


def edited(method: str, index: int, *, exact: bool, task: str = "needles_early") -> dict:
    reply = {"kind": "target", "exact": exact, "f1": 1.0, "correct": exact, "clean_correct": True, "leak": not exact}
    reply |= {"kl": 0.1, "top1": 1.0, "tokens": 2}
    counts = dict.fromkeys(("slots_dropped", "slots_replaced", "slots_left", "suffix_left", "tokens_recomputed"), 1)
    arm = {"policy": "full", "budget": "1.0", "peer": method}
    record = {"task": task, "length": 1024, "index": index, "arm": arm, "method": method, "kept": True}
    record |= {"kept_only": False, "questions": [reply], "edit_s": 0.1, "held": 9, "context_tokens": 9}
    return record | {"span_tokens": [3], **counts}


def test_the_verdict_pools_needles_of_all_lengths_beside_recompute():
    records = [edited("recompute", i, exact=True) for i in range(4)]
    records += [edited("learned", i, exact=i > 0) for i in range(4)]
    records += [edited("learned", 9, exact=False, task="repeat")]
    longer = [edited(method, i, exact=True) | {"length": 4096} for method in ("recompute", "learned") for i in (20, 21)]
    easier = [edited("drop", i, exact=True) for i in range(4)]  # not run where texts are long
    assert {row["method"] for row in erase.verdict([*records, *longer, *easier])} == {"recompute", "learned"}
    rows = {row["method"]: row for row in erase.verdict(records)}
    assert rows["learned"]["n"] == 4 and rows["learned"]["exact"] == 0.75
    assert rows["learned"]["exact_over_recompute"] == -0.25
    low, high = rows["learned"]["exact_over_recompute_ci95"]
    assert low <= -0.25 <= high


def test_where_methods_ran_only_on_what_passes_the_filter_all_figures_are_of_that():
    passing = [edited(method, 0, exact=True) for method in ("noop", "learned")]
    rest = [edited("noop", i, exact=False) | {"kept": False} for i in (1, 2)]
    records = [record | {"kept_only": record["method"] != "noop"} for record in (*passing, *rest)]
    said = erase.format_tables(aggregate(records, {}))
    assert "| method | needles_early 1024, filtered |" in said and "| samples | 3 |" not in said
    assert said.count("| noop | 1.00 (0.21 to 1.00) |") == 3  # exact of the kept, of all shown, and right answers


def test_the_report_has_tables_and_pictures_of_what_is_there(tmp_path):
    records = [edited(method, i, exact=True) for method in ("noop", "recompute", "learned") for i in range(3)]
    part = tmp_path / "needles"
    part.mkdir()
    rows = aggregate(records, {"model": "m"})
    (part / "rows.json").write_text(json.dumps({"rows": rows}))
    (part / "samples.jsonl").write_text("\n".join(map(json.dumps, records)))
    timed = [
        {"length": n, "method": name, "edit_s": n / 1e4, "before": 100, "span": 100}
        for n in (1024, 2048)
        for name in ("noop", "recompute", "learned")
    ]
    (tmp_path / "speed.json").write_text(json.dumps({"rows": timed}))
    erase.summarize(tmp_path)
    said = (tmp_path / "report.md").read_text()
    assert "| learned | 1.00 (0.44 to 1.00) |" in said and "needles, all lengths together" in said
    assert "svg" in (part / "exact.svg").read_text() and "milliseconds" in (tmp_path / "edit.svg").read_text()
    assert {row["method"] for row in json.loads((tmp_path / "needles.json").read_text())} == {
        "noop", "recompute", "learned",
    }  # fmt: skip


# Retention gates.

OURS = ("retention", "0.1")


@pytest.fixture(scope="module")
def small():
    return tiny("llama", max_position_embeddings=8192)


def test_gates_meet_kvzip_and_the_best_of_the_field_at_equal_bytes_on_the_test_split(small):
    runs = retention.make_parts(small)
    assert set(runs) == {*map(str, retention.BUDGETS), *(f"{length}-presses" for length in retention.BUDGETS)}
    for name, budgets in (("2048", {"0.25", "0.1", "0.05"}), ("1024", {"0.1"}), ("4096", {"0.1"})):
        run = runs[name]
        assert run.config.split == "test" and run.config.lengths == (int(name),)
        assert run.config.samples == (10 if name == "4096" else 20)
        methods = ("retention", *retention.RIVALS, *retention.CONTROLS)
        assert {(policy, fraction) for (policy, _, _), fraction in run.fractions.items()} == set(
            product(methods, budgets)
        )
        pressed = runs[f"{name}-presses"].config
        peers = {(arm.policy, arm.budget) for arm in pressed.methods}
        assert len(peers) == 3 * len(budgets) and {budget for _, budget in peers} == budgets
        assert "dialogue/recall" not in pressed.tasks  # whose later texts presses hold whole
        alike = ("split", "samples", "lengths", "essays", "answer_room", "seed")
        assert all(getattr(pressed, field) == getattr(run.config, field) for field in alike)
    assert "kvzip(share=model)" in retention.RIVALS and len(retention.RIVALS) == 4


def test_rivals_are_chosen_on_dev_from_all_that_need_no_question():
    runs = retention.make_rival_choice()
    assert {run.split for run in runs.values()} == {"dev"}
    tried = {arm.policy for arm in runs["policies"].methods}
    learned = {"duo_attention", "indexmem"}  # need patterns, weights
    apart = {*learned, "retention", "kvzip", "random", "streaming_llm"}  # judged anyway
    assert tried == POLICIES.keys() - apart
    known = tried | {"kvzip"}
    assert all(name.partition("(")[0] in known for name in retention.RIVALS)
    assert retention.PRESSES.keys() <= set(retention.CANDIDATE_PRESSES)


def kept(policy: str, budget: str, *scores: float) -> list[dict]:
    arm = {"policy": policy, "budget": budget, "memory": "none"}
    arm |= {"share": None, "peer": policy if ":" in policy else None}
    return [
        {"task": "t", "index": i, "length": 2048, "score": score, "kv_bytes": 1e6, "arm": arm}
        for i, score in enumerate(scores)
    ]


def test_the_verdict_pairs_samples_and_takes_equal_bytes_for_one_budget(small):
    part = retention.make_parts(small)["2048"]
    own = next(budget for (policy, _, budget), fraction in part.fractions.items() if (policy, fraction) == OURS)
    records = kept("full", "1.0", 1, 1, 1, 0) + kept("snapkv", "0.1", 0, 0, 1, 0)
    records += kept("kvpress:KVzipPress", "0.1", 1, 1, 1, 1)
    records += kept("retention", own, 1, 0, 1)  # the last one is still to come
    rows = {row["policy"]: row for row in comparison.verdict(records, "retention", part.budget_of)}
    assert set(rows) == {"snapkv", "kvpress:KVzipPress", "retention"}
    assert {row["budget"] for row in rows.values()} == {"0.1"}
    assert rows["snapkv"]["ours_above"] == 1 / 3 and rows["snapkv"]["of_full"] == 1 / 3
    assert rows["retention"]["of_full"] == 2 / 3 and rows["retention"]["n"] == 3
    shown = comparison.format_table(list(rows.values()), "retention")
    assert "| 2048 | 0.1 | snapkv | 4 | 1.00 | 0.25" in shown and "+0.33" in shown
    assert "| 2048 | 0.1 | KVzip (kvpress) | 4 |" in shown
    assert comparison.draw_scores(list(rows.values()), 2048, "a model").startswith("<svg")


def test_the_summary_of_gates_is_of_what_is_there(small, tmp_path):
    made = retention.make_parts(small)
    own = next(budget for (policy, _, budget), fraction in made["2048"].fractions.items() if (policy, fraction) == OURS)
    records = kept("full", "1.0", 1, 1) + kept("retention", own, 1, 1) + kept("random", "0.1", 0, 1)
    (tmp_path / "2048").mkdir()
    (tmp_path / "2048" / "samples.jsonl").write_text("\n".join(map(json.dumps, records)))
    retention.summarize(tmp_path, made)
    assert "+0.50" in (tmp_path / "verdict.md").read_text() and (tmp_path / "scores-2048.svg").exists()
    assert not (tmp_path / "scores-1024.svg").exists()


def test_gates_are_trained_in_ways_that_differ_from_their_baseline_in_what_they_are_named_for():
    made = {way: ablations.make_training(way, ("texts",), "text") for way in ablations.WAYS}

    def changed(way: str, baseline: str) -> set[str]:
        one, other = made[way], made[baseline]
        assert one.loop == other.loop and (one.width, one.depth, one.bias) == (other.width, other.depth, other.bias)
        options = {name for name, value in asdict(one.options).items() if value != getattr(other.options, name)}
        return options | ({"tied"} if one.tied != other.tied else set())

    assert changed("per-layer", "at-once") == changed("per-head", "at-once") == {"tied", "share"}
    assert changed("start-alone", "at-once") == {"warm"}
    assert changed("start-by-lives", "start-alone") == {"warm_loss"}
    assert changed("start-by-replay", "start-alone") == {"warm_by"}
    assert changed("gradually", "at-once") == {"forgets"}
    assert changed("without-capacity", "gradually") == {"capacity_weight"}


def test_ways_are_shown_by_budget_beside_what_they_differ_from():
    def records(policy: str, budget: str, *scores: float) -> list[Record]:
        arm = {"policy": policy, "budget": budget}
        return [{"arm": arm, "task": "t", "index": index, "score": score} for index, score in enumerate(scores)]

    made = [*records("full", "1.0", 1.0, 0.5), *records("a", "0.25", 0.5, 1.0), *records("b", "0.25", 1.0, 1.0)]
    shown = ablations.format_table([*made, *records("b", "0.05", 0.0)], {"a": "at-once", "b": "gradually"}).splitlines()
    assert shown[2:] == [
        "| full |  | 0.75 | 0.75 | 0.75 |",
        "| at-once |  | 0.75 |  |  |",
        "| gradually | at-once | 1.00, +0.25 (+0.00 to +0.50) |  | 0.00 |",
    ]
    assert set(ablations.BASELINES) | set(ablations.BASELINES.values()) < set(ablations.WAYS)


def test_gates_are_compared_once_they_are_done(tmp_path):
    (tmp_path / "at-once" / "gates").mkdir(parents=True)
    assert not ablations.is_done(tmp_path / "at-once")  # killed while it wrote
    (tmp_path / "at-once" / "gates" / "card.json").touch()
    assert ablations.is_done(tmp_path / "at-once")
    names = [ablations.make_policy_name(way, tmp_path) for way in ("at-once", "per-head")]
    run = ablations.make_comparison(names, None, "test")
    assert {(arm.share, arm.budget) for arm in run.methods[1:]} == {
        (share, budget) for share in ("model", "head") for budget in ablations.BUDGETS
    }
    assert (
        len({vestige_runner.sharing_key(arm.make_policy(seed=0)) for arm in run.methods}) == 3
    )  # no gates read what others wrote


# Dilution.


def test_dilution_is_measured_beside_the_full_cache_of_the_same_sample(chatter):
    model, tokenizer = chatter
    config = BenchConfig(
        tasks=("ruler/niah_multikey_2",), methods=(), lengths=(480,), samples=1, answer_room=retention.ANSWER_ROOM
    )
    seen = list(distractor_attention.measure(config, model, tokenizer))
    arms = {(one["arm"]["policy"], one["arm"]["budget"]) for one in seen}
    assert arms == {
        (method, budget) for method in distractor_attention.METHODS for budget in distractor_attention.BUDGETS
    }
    assert len({(one["score_full"], one["dilution_full"]) for one in seen}) == 1
    assert all(0 <= one["dilution"] <= 1 for one in seen)
    assert all(one["dilution"] != one["dilution_full"] for one in seen if one["arm"]["budget"] in ("0.25", "0.1"))
    known = [one["arm"] for one in seen]
    assert not list(
        distractor_attention.measure(config, model, tokenizer, done=lambda task, length, index, arm: arm in known)
    )
    assert len(
        list(distractor_attention.measure(config, model, tokenizer, done=lambda *at: at[3] in known[1:]))
    ) == len(known)
    (row,) = [
        row
        for row in distractor_attention.aggregate_records(seen)
        if row["method"] == "retention" and row["budget"] == "0.1"
    ]
    assert row["n"] == 1 and row["gain"] == row["score"] - row["score_full"]
    assert ">retention, share model<" in distractor_attention.draw_gains([row], row["task"])
    assert f"| retention | 0.1 | 1 | {row['score_full']:.2f} |" in distractor_attention.format_table([row])
