"""Published runs say what they promise, and take only what was chosen on dev."""

from vestige.recipes import bench


def test_the_comparison_runs_every_method_beside_its_press_on_the_test_split():
    config = bench.comparison(2048)
    assert config.split == "test" and config.samples == 20 and config.lengths == (2048,) and config.answer_room == 16
    own = {(arm.policy, arm.share, arm.budget) for arm in config.arms if arm.peer is None}
    budgets = ("0.5", "0.25", "0.1", "0.05")
    methods = ("random", "streaming_llm", "knorm", "keydiff", "tova", "snapkv")
    expected = {("full", "head", "1.0")} | {(name, "head", budget) for name in methods for budget in budgets}
    expected |= {(name, "model", budget) for name in ("keydiff", "snapkv") for budget in budgets}
    assert own == expected
    peers = {(arm.policy, arm.budget, arm.samples) for arm in config.arms if arm.peer is not None}
    presses = ("Random", "StreamingLLM", "Knorm", "KeyDiff", "TOVA", "SnapKV")
    wanted = {(f"kvpress:{name}Press", budget, None) for name in presses for budget in budgets}
    wanted |= {("kvpress:KVzipPress", budget, 10) for budget in budgets}
    assert peers == wanted | {("transformers:dynamic", "1.0", None), ("transformers:quantized", "1.0", None)}


def test_the_shorter_texts_are_run_at_one_budget():
    assert {arm.budget for arm in bench.comparison(1024).arms} == {"1.0", "0.25"}


def test_tasks_are_chosen_by_the_full_cache_alone_on_dev_from_candidates_that_have_them():
    config = bench.choosing(2048)
    assert config.split == "dev" and [arm.policy for arm in config.arms] == ["full"]
    assert set(bench.TASKS) <= set(config.tasks) and len(bench.TASKS) <= 4
