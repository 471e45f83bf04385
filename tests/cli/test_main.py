"""The command line's contract: fields of --json, exit status, one clear line for bad input, nothing left behind."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Outcome, tree
from vestige.memory import MEMORIES
from vestige.models.catalog import NAMED
from vestige.policies import POLICIES

QUESTION = "Who keeps lamp 16?"
EVICT = ("--policy", "streaming_llm", "--budget", "48")
SHORT = ("--max-new-tokens", "8", "--chunk", "64")

NUMBER, WHOLE, TEXT, MAYBE = (int, float), int, str, (int, type(None))
RUN_FIELDS = {
    "answer": TEXT, "answers": list, "seen": WHOLE, "held": WHOLE, "kept_fraction": float, "kv_bytes": WHOLE,
    "peak_kv_bytes": WHOLE, "full_kv_bytes": WHOLE, "other_kv_bytes": WHOLE, "memory_bytes": WHOLE,
    "prefill_s": NUMBER, "evict_s": NUMBER, "decode_tokens_per_s": NUMBER, "policy": TEXT, "share": TEXT,
    "memory": TEXT, "budget": (str, type(None)), "budget_total": MAYBE, "chunk": WHOLE, "model": TEXT,
}  # fmt: skip
SPEED_FIELDS = {
    "length": WHOLE, "batch": WHOLE, "policy": TEXT, "budget": TEXT, "decode_ms": float, "floor_ms": float,
    "full_decode_ms": float, "decode_over_floor": float, "decode_speedup": float, "prefill_s": float,
    "full_prefill_s": float, "prefill_overhead": float, "evict_s": NUMBER, "kv_bytes": WHOLE, "peak_kv_bytes": WHOLE,
}  # fmt: skip


def timeless(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("prefill_s", "evict_s", "decode_tokens_per_s")}


# run


@pytest.mark.parametrize("arguments", [(), EVICT, ("--policy", "snapkv", "--budget", "0.25", "--share", "model")])
def test_run_json_has_exactly_the_fields_of_the_contract(vestige, folders, place, arguments):
    result = vestige(
        "run", "--model", folders.chat, "--context", "story.txt", "--question", QUESTION, *SHORT, *arguments, "--json"
    )
    assert result.code == 0, result.err
    assert len(result.out.splitlines()) == 1
    row = result.row
    assert set(row) == set(RUN_FIELDS)
    for name, kind in RUN_FIELDS.items():
        assert isinstance(row[name], kind) and not isinstance(row[name], bool), name
    assert row["answers"] == [row["answer"]] and row["answer"]
    assert (row["model"], row["chunk"], row["memory"]) == (str(folders.chat), 64, "none")
    assert set(tree(place)) == {"story.txt"}


def test_run_json_numbers_are_those_of_the_budget(vestige, folders, place):
    base = ("run", "--model", folders.chat, "--context", "story.txt", "--question", QUESTION, *SHORT, "--json")
    full, tokens, share = (
        vestige(*base, *more).row for more in ((), EVICT, ("--policy", "keydiff", "--budget", "0.25"))
    )
    assert (full["policy"], full["budget"], full["budget_total"]) == ("full", None, None)
    assert full["held"] == full["seen"] * 6 and full["kept_fraction"] == 1.0
    assert (tokens["policy"], tokens["budget"], tokens["budget_total"], tokens["held"]) == (
        "streaming_llm", "48", 288, 288,
    )  # fmt: skip
    assert tokens["kept_fraction"] == 288 / full["held"]
    assert tokens["full_kv_bytes"] == full["full_kv_bytes"] > tokens["peak_kv_bytes"] >= tokens["kv_bytes"]
    assert (share["policy"], share["budget"]) == ("keydiff", "0.25")
    assert share["budget_total"] == share["held"] >= 0.25 * share["seen"] * 6  # of context + question


def test_several_questions_give_several_answers(vestige, folders, place):
    asked = ("Who keeps lamp 16?", "How many lamps?", "Why?")
    base = ("run", "--model", folders.chat, "--context", "story.txt", *EVICT, *SHORT, "--json")
    row = vestige(*base, *(word for question in asked for word in ("--question", question))).row
    assert row["answer"] == row["answers"][0]
    assert row["answers"] == [vestige(*base, "--question", question).row["answer"] for question in asked]


def test_a_prompt_is_read_like_a_file(vestige, folders, place, story):
    base = ("run", "--model", folders.chat, "--question", QUESTION, *EVICT, *SHORT, "--json")
    rows = vestige(*base, "--prompt", story).row, vestige(*base, "--context", "story.txt").row
    assert timeless(rows[0]) == timeless(rows[1])


def test_a_model_without_a_chat_template_runs(vestige, folders, place):
    row = vestige("run", "--model", folders.plain, "--context", "story.txt", "--question", "Who?", *SHORT, "--json").row
    assert row["answer"]


def test_a_saved_reading_gives_the_row_of_the_direct_run(vestige, folders, place):
    base = ("run", "--model", folders.chat, "--question", QUESTION, "--question", "Why?", *SHORT, "--json")
    direct = vestige(*base, "--context", "story.txt", *EVICT, "--save", "kept").row
    before = tree(place)
    assert set(before) == {"story.txt", "kept", "kept/cache.json", "kept/cache.safetensors"}
    again = vestige(*base, "--cache", "kept").row
    assert tree(place) == before
    bytes_now = ("kv_bytes", "peak_kv_bytes")  # of storage that was laid out anew
    assert {k: v for k, v in timeless(again).items() if k not in bytes_now} == {
        k: v for k, v in timeless(direct).items() if k not in bytes_now
    }
    assert again["prefill_s"] == 0


def test_save_needs_no_question_and_answers_nothing(vestige, folders, place):
    result = vestige("run", "--model", folders.chat, "--context", "story.txt", *EVICT, "--save", "kept", "--json")
    assert result.code == 0
    assert (result.row["answer"], result.row["answers"]) == ("", [])
    assert (place / "kept" / "cache.json").is_file()


def test_the_seed_changes_what_random_keeps(vestige, folders, place):
    base = ("run", "--model", folders.chat, "--context", "story.txt", "--question", QUESTION, *SHORT, "--json")
    rows = [vestige(*base, "--policy", "random", "--budget", "40", "--seed", seed).row for seed in (1, 1, 2)]
    assert timeless(rows[0]) == timeless(rows[1])
    assert rows[0]["answer"] != rows[2]["answer"]


@pytest.mark.parametrize("memory", ["moments", "centroids(centroids=4)"])
def test_a_memory_is_used_counted_saved_and_said(vestige, folders, place, memory):
    base = ("run", "--model", folders.chat, "--question", QUESTION, *SHORT, "--json")
    none, row = (
        vestige(*base, "--context", "story.txt", *EVICT, "--memory", name, "--save", name).row
        for name in ("none", memory)
    )
    assert (none["memory"], none["memory_bytes"]) == ("none", 0)
    assert row["memory"] == memory.partition("(")[0] and row["memory_bytes"] > 0
    assert row["kv_bytes"] - row["memory_bytes"] == none["kv_bytes"] and row["held"] == none["held"]
    assert row["answer"] != none["answer"]
    again = vestige(*base, "--cache", memory).row
    assert {key: again[key] for key in ("memory", "memory_bytes", "answer", "held")} == {
        key: row[key] for key in ("memory", "memory_bytes", "answer", "held")
    }


@pytest.mark.parametrize("seed", [-1, 2**32 - 1])
def test_any_number_of_32_bits_is_a_seed(vestige, folders, place, seed):
    base = ("run", "--model", folders.chat, "--context", "story.txt", "--question", QUESTION, *SHORT, "--json")
    assert vestige(*base, "--policy", "random", "--budget", "40", "--seed", seed).code == 0


# Bad input: found before a model is read

RUN = ("run", "--prompt", "some text", "--question", "Who?")
ASK = ("run", "--question", "Who?")
BAD_ANYWHERE = {
    "unknown policy": (
        (*RUN, "--policy", "snapvk", "--budget", "64"),
        r"unknown policy 'snapvk'; did you mean 'snapkv'\? available: .*full, ",
    ),
    "a policy like no other": ((*RUN, "--policy", "zzz", "--budget", "64"), "unknown policy 'zzz'.* available: .*full"),
    "unknown share": ((*RUN, *EVICT, "--share", "heads"), r"unknown share 'heads'; did you mean 'head'\? available: "),
    "unknown memory": (
        (*RUN, *EVICT, "--memory", "moment"),
        "unknown memory 'moment'; did you mean 'moments'.* available: none",
    ),
    "memory of a wrong option": (
        (*RUN, *EVICT, "--memory", "moments(max=1)"),
        "no option 'max'; available: dtype, mass",
    ),
    "missing budget": ((*RUN, "--policy", "snapkv"), "policy 'snapkv' needs a budget"),
    "budget of full": ((*RUN, "--budget", "64"), "'full' takes no budget"),
    "full with a budget": ((*RUN, "--policy", "full", "--budget", "64"), "'full' takes no budget"),
    "budget in words": ((*RUN, "--policy", "tova", "--budget", "many"), "cannot read budget 'many'; write tokens"),
    "empty budget": ((*RUN, "--policy", "tova", "--budget", ""), "cannot read budget ''"),
    "negative budget": ((*RUN, "--policy", "tova", "--budget", "-5"), "must be a positive number, got -5"),
    "fraction above one": ((*RUN, "--policy", "tova", "--budget", "1.5"), r"fraction must lie in \(0, 1\], got 1.5"),
    "infinite budget": ((*RUN, "--policy", "tova", "--budget", "1e999MB"), "budget"),
    "endless budget": ((*RUN, "--policy", "tova", "--budget", "9" * 400), "budget"),
    "budget below the protected": ((*RUN, "--policy", "tova", "--budget", "20"), "20 pairs a row.* protect 36"),
    "seed of 40 bits": ((*RUN, "--policy", "random", "--budget", "64", "--seed", 2**40), "seed must fit into 32 bits"),
    "missing file": ((*ASK, "--context", "gone.txt"), "no such file: gone.txt"),
    "folder as file": ((*ASK, "--context", "folder"), "cannot read folder: Is a directory"),
    "binary file": ((*ASK, "--context", "binary"), "binary is not UTF-8 text"),
    "file with NUL bytes": ((*ASK, "--context", "nul"), "nul is not text: it has NUL bytes"),
    "empty file": ((*ASK, "--context", "empty"), "empty is empty"),
    "empty prompt": ((*ASK, "--prompt", ""), "--prompt is empty"),
    "empty question": (("run", "--prompt", "x", "--question", ""), "--question is empty"),
    "no question": (("run", "--prompt", "x"), "at least one --question"),
    "no source": (ASK, "exactly one of --context FILE and --prompt TEXT"),
    "two sources": ((*RUN, "--context", "story.txt"), "exactly one of"),
    "three sources": ((*RUN, "--context", "story.txt", "--cache", "folder"), "exactly one of"),
    "cache and policy": ((*ASK, "--cache", "folder", *EVICT), "brings its policy and budget along"),
    "cache and memory": ((*ASK, "--cache", "folder", "--memory", "moments"), "and its memory; leave .*--memory out"),
    "explain memory": ((*ASK, "--context", "story.txt", "--explain", "x", "--memory", "moments"), "leave --memory out"),
    "explain a cache": ((*ASK, "--cache", "folder", "--explain", "x"), "--explain needs a text to read"),
    "save into a full folder": ((*RUN, "--save", "full"), "full exists and is not empty"),
    "save onto a file": ((*RUN, "--save", "story.txt"), "story.txt exists"),
    "unknown option": ((*RUN, "--polcy", "full"), "No such option: --polcy.*--policy"),
    "unknown command": (("rum",), "No such command 'rum'"),
    "option without value": ((*RUN, "--budget"), "--budget.*requires an argument"),
    "word for a number": ((*RUN, "--chunk", "many"), "--chunk"),
    "fraction for a number": ((*RUN, "--seed", "0.5"), "--seed"),
    "number out of range": ((*RUN, "--max-new-tokens", "0"), "--max-new-tokens.* 1"),
    "stray word": ((*RUN, "stray"), "unexpected extra argument.*stray"),
    "unknown model": ((*RUN, "--model", "smolm2-135m"), "unknown model 'smolm2-135m'; did you mean 'smollm2-135m'"),
    "no model folder": ((*RUN, "--model", "./gone"), r"there is no folder ./gone"),
    "folder without model": ((*RUN, "--model", "./folder"), "holds no model: config.json is missing"),
    "model as file": ((*RUN, "--model", "story.txt"), "story.txt is a file"),
    "unknown dtype": ((*RUN, "--model", "./folder", "--dtype", "float99"), "unknown dtype 'float99'; valid: "),
    "unknown device": ((*RUN, "--model", "./folder", "--device", "gpu9"), "cannot use the device 'gpu9'"),
    "speed: no length": (("bench", "speed", "--length", "long"), "--length takes whole numbers .*'long'"),
    "speed: zero length": (("bench", "speed", "--length", "0"), "--length must be positive"),
    "speed: zero batch": (("bench", "speed", "--batch", "1,0"), "--batch must be positive"),
    "speed: unknown policy": (("bench", "speed", "--policy", "full,snapvk"), "did you mean 'snapkv'"),
    "speed: empty policy": (("bench", "speed", "--policy", ","), "--policy"),
    "speed: empty budget": (("bench", "speed", "--budget", ""), "--budget"),
    "speed: bad budget": (("bench", "speed", "--budget", "0.1,x"), "cannot read budget 'x'"),
    "speed: small budget": (("bench", "speed", "--budget", "20"), "20 pairs a row.* protect 36"),
    "speed: unknown share": (("bench", "speed", "--share", "all"), "unknown share 'all'.* available: head, layer"),
    "bench: idle budget": (("bench", "niah", "--budget", "0.1", "--out", "new"), "--budget without a --policy that"),
    "bench: idle memory": (
        ("bench", "niah", "--memory", "none,moments", "--share", "head", "--out", "new"),
        "--share and --memory without a --policy that evicts; policy full keeps everything",
    ),
    "train: no such data": (("train", "indexmem", "--data", "gone.txt", "--out", "new"), "no such .*: gone.txt"),
    "train: full folder": (
        ("train", "retention", "--data", "story.txt", "--out", "full"),
        "full exists and is not empty",
    ),
    "threshold in words": ((*RUN, "--policy", "knorm(threshold=abc)"), "threshold takes a number or None, got 'abc'"),
    "endless name": ((*RUN, "--save", "x" * 300), "cannot use x+: File name too long"),
    "unknown task": (("bench", "sped"), "unknown task 'sped'.* available: .*ruler"),
}


@pytest.fixture
def bad_place(place) -> Path:
    """Add what no command can read."""
    for folder in ("folder", "full"):
        Path(folder).mkdir()
    Path("full", "x").write_text("x")
    Path("binary").write_bytes(bytes(range(256)))
    Path("nul").write_bytes(b"a\0b")
    Path("empty").write_text("\n")
    return place


@pytest.mark.parametrize("case", BAD_ANYWHERE)
def test_bad_input_is_one_line_and_exit_status_2(vestige, bad_place, monkeypatch, case):
    def fetch(name: str, **_: object) -> None:
        raise AssertionError(f"{name} was fetched before the input was checked")

    monkeypatch.setattr("vestige.models.loading.fetch", fetch)
    words, message = BAD_ANYWHERE[case]
    before = tree(bad_place)
    assert re.search(message, vestige(*words).complaint())
    assert tree(bad_place) == before
    if words[-1] != "--budget":
        assert re.search(message, vestige(*words, "--json").complaint())


def test_a_conversation_that_was_kept_brings_its_options_along(vestige, bad_place):
    said = vestige("chat", "--load", "folder", *EVICT).complaint()
    assert "leave --policy, --budget, --share, --memory and --system out" in said


# Bad input: found with the model at hand


def with_model(vestige, folders, *words: object) -> Outcome:
    return vestige("run", "--model", folders.chat, "--question", "Who?", "--save", "new/kept", *words, "--json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--context", "long.txt"), r"context and question are \d+ tokens.* 512 positions"),
        (("--context", "long.txt", *EVICT), r"context and question are \d+ tokens.* 512 positions"),
        (("--context", "story.txt", "--policy", "knorm", "--budget", "0.1"), r"gives \d+ pairs a row.* protect 36"),
        (("--context", "story.txt", "--policy", "knorm", "--budget", "9KB"), r"gives \d+ pairs a row.* protect 36"),
        (("--context", "story.txt", "--explain", "lamp 17"), "passage 'lamp 17' does not occur in the text"),
        (("--cache", "gone"), "gone is not a saved cache"),
        (("--cache", "story.txt"), "story.txt is not a saved cache"),
        (("--cache", "."), "is not a saved cache: no cache.json"),
        (("--prompt", "\udcff"), "--prompt"),
        (("--prompt", "x", "--save", "story.txt/kept"), "cannot write the cache to story.txt/kept"),
    ],
)
def test_what_only_the_model_can_tell_is_one_line_and_leaves_no_file(vestige, folders, place, words, message):
    Path("long.txt").write_text("x" * 600)
    before = tree(place)
    assert re.search(message, with_model(vestige, folders, *words).complaint())
    assert tree(place) == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated tensors": ("cache.safetensors", truncate),
    "edited tensor": ("cache.safetensors", flip_a_byte),
    "empty tensors": ("cache.safetensors", lambda path: path.write_bytes(b"")),
    "no tensors": ("cache.safetensors", Path.unlink),
    "truncated JSON": ("cache.json", truncate),
    "JSON of another kind": ("cache.json", lambda path: path.write_text("[1, 2]")),
    "binary JSON": ("cache.json", lambda path: path.write_bytes(b"\xff\x00")),
    "no JSON": ("cache.json", Path.unlink),
}


@pytest.fixture(scope="module")
def kept(folders, tmp_path_factory) -> Path:
    """Keep one reading for the tests that damage a copy of it."""
    from vestige.models.loading import load
    from vestige.pipelines.document_qa import RunConfig, run

    folder = tmp_path_factory.mktemp("kept") / "kept"
    text = "The lamp is lit. " * 10
    run(RunConfig(questions=(), prompt=text, policy="snapkv", budget="40", save=folder), *load(folders.chat))
    return folder


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_saved_cache_is_refused_by_name(vestige, folders, place, kept, case):
    name, damage = DAMAGE[case]
    shutil.copytree(kept, "copy")
    damage(Path("copy", name))
    before = tree(place)
    complaint = with_model(vestige, folders, "--cache", "copy").complaint()
    assert re.search("copy is (damaged|not a saved cache)", complaint) and len(complaint) < 300
    assert tree(place) == before


def test_a_saved_cache_of_another_model_is_refused(vestige, folders, place, kept):
    words = ("run", "--model", folders.other, "--cache", kept, "--question", "Who?", "--save", "new")
    assert "was made for another model or other weights" in vestige(*words).complaint()
    assert set(tree(place)) == {"story.txt"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_corrupt_model_file_is_one_line(vestige, folders, place, name):
    shutil.copytree(folders.chat, "model")
    truncate(Path("model", name))
    complaint = vestige("run", "--model", "./model", "--prompt", "x", "--question", "Who?", "--save", "new").complaint()
    assert "cannot load the model in model" in complaint
    assert not Path("new").exists()


def test_an_interrupt_is_one_line_and_leaves_no_file(vestige, folders, place, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vestige.cache.serialization.save_file", interrupted)
    result = vestige("run", "--model", folders.chat, "--prompt", "x", "--save", "new", "--json")
    assert (result.code, result.out) == (130, "")
    assert result.err.splitlines()[-1] == "error: interrupted"
    assert set(tree(place)) == {"story.txt"}


# Listings


@pytest.mark.parametrize(("command", "names"), [("policies", POLICIES), ("memories", MEMORIES), ("models", NAMED)])
def test_listings_have_a_line_for_each_name(vestige, command, names):
    result = vestige(command)
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines] == list(names)
    assert all(re.match(r"\S+  +\S.*\S$", line) for line in lines)
    listed = vestige(command, "--json")
    assert list(listed.row) == list(names)
    assert [f"{name} {text}" for name, text in listed.row.items()] == [" ".join(line.split()) for line in lines]


def test_the_version_is_printed(vestige):
    from vestige import __version__

    assert vestige("--version") == Outcome(0, f"vestige {__version__}\n", "")


@pytest.mark.parametrize("words", [(), ("bench",)])
def test_a_command_without_a_task_shows_its_help_as_it_is(vestige, words):
    result = vestige(*words)
    assert "\nCommands:\n" in result.out + result.err


COMMANDS = ("run", "demo", "models", "policies", "memories", "bench speed")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_options_of_the_contract(vestige, command):
    result = vestige(*command.split(), "--help")
    assert result.code == 0 and result.err == ""
    common = {"--help", "--json", "--seed"}
    loads = {"--device", "--dtype"} if command not in ("models", "policies", "memories") else set()
    assert common | loads <= set(re.findall(r"--[a-z-]+", result.out))


def test_run_help_has_every_option_of_the_contract(vestige):
    options = (
        "model context prompt cache question policy budget share memory chunk max-new-tokens save device dtype seed "
        "json help explain"
    )
    found = set(re.findall(r"^  --([a-z-]+)", vestige("run", "--help").out, re.MULTILINE))
    assert found == set(options.split())


# bench speed

SPEED = ("bench", "speed", "--length", "60", "--blocks", "1", "--prefills", "1", "--chunk", "32")


def test_bench_speed_rows_have_the_fields_of_the_contract_and_ratios_that_agree(vestige, folders):
    result = vestige(*SPEED, "--model", folders.chat, "--budget", "40", "--policy", "streaming_llm", "--json")
    assert result.code == 0 and len(result.out.splitlines()) == 1
    assert set(result.row) == {"rows"}
    (row,) = result.row["rows"]
    for name, kind in SPEED_FIELDS.items():
        assert isinstance(row[name], kind), name
        assert not isinstance(row[name], int | float) or (math.isfinite(row[name]) and row[name] > 0), name
    assert (row["length"], row["batch"], row["policy"], row["budget"]) == (60, 1, "streaming_llm", "40")
    assert row["model"] == str(folders.chat) and row["random_weights"] is False
    assert row["decode_over_floor"] == pytest.approx(row["decode_ms"] / row["floor_ms"])
    assert row["decode_speedup"] == pytest.approx(row["full_decode_ms"] / row["decode_ms"])
    assert row["prefill_overhead"] == pytest.approx(row["prefill_s"] / row["full_prefill_s"])
    assert row["prefill_s"] >= row["evict_s"]
    assert row["held"] == 40 * 6 and row["kept_fraction"] == pytest.approx(40 / 60)
    assert row["peak_kv_bytes"] >= row["kv_bytes"] == 240 * 132


def an_eighth(block, model) -> None:
    """Take the place of decoding: the whole block takes .128 seconds."""
    block.left, block.seconds = 0, 0.128


def test_bench_speed_has_a_row_for_each_length_batch_policy_and_budget(vestige, folders, monkeypatch):
    monkeypatch.setattr("vestige.bench.timing._Decoding.take_turn", an_eighth)
    lists = ("--length", "50,60", "--batch", "1,2", "--budget", "40,0.8", "--policy", "streaming_llm,full")
    rows = vestige(*SPEED, "--model", folders.chat, *lists, "--json").row["rows"]
    arms = [("streaming_llm", "40"), ("streaming_llm", "0.8"), ("full", "1.0")]
    found = [(row["length"], row["batch"], row["policy"], row["budget"]) for row in rows]
    assert found == [(length, batch, *arm) for length in (50, 60) for batch in (1, 2) for arm in arms]
    held = {(row["length"], row["batch"], row["budget"]): row["held"] for row in rows}
    assert held[60, 2, "40"] == 2 * held[60, 1, "40"] == 2 * 6 * 40
    assert held[50, 1, "0.8"] == 6 * 40 and held[60, 1, "0.8"] == 6 * 48 and held[50, 2, "1.0"] == 2 * 6 * 50
    assert {(row["decode_ms"], row["decode_over_floor"], row["decode_speedup"]) for row in rows} == {(1.0, 1.0, 1.0)}


def test_bench_speed_beyond_the_positions_uses_random_weights_and_says_so(vestige, folders, monkeypatch):
    monkeypatch.setattr("vestige.bench.timing._Decoding.take_turn", an_eighth)
    words = (*SPEED, "--model", folders.chat, "--budget", "40", "--policy", "streaming_llm", "--length", "500")
    result = vestige(*words)
    assert result.code == 0
    assert "random weights and stretched positions" in " ".join(result.err.split())
    assert "streaming_llm" in result.out and "500" in result.out
    assert max(map(len, result.out.splitlines())) <= 80


def test_bench_speed_with_a_fraction_below_the_protected_is_one_line(vestige, folders):
    words = (*SPEED, "--model", folders.chat, "--budget", "0.05", "--policy", "streaming_llm")
    assert re.search("budget 0.05 gives 3 pairs a row.* protect 36", vestige(*words, "--json").complaint())


# A fresh process

IMPORTS = """
import sys
import vestige
HEAVY = {"torch", "transformers", "gguf", "accelerate", "peft", "datasets", "matplotlib", "numpy"}
assert not HEAVY & set(sys.modules), HEAVY & set(sys.modules)
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, PreTrainedModel
from transformers import modeling_utils, cache_utils
watched = [GenerationMixin, PreTrainedModel, AttentionInterface, AttentionMaskInterface, cache_utils.Cache, cache_utils]
watched += [modeling_utils, AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping]
def now():
    return [dict(x) if isinstance(x, dict) else dict(vars(x)) for x in watched]
before, optional = now(), {"gguf", "peft", "datasets", "matplotlib"} - set(sys.modules)
import vestige.cache.kv_cache, vestige.cache.attach
for name in vestige.__all__:
    getattr(vestige, name)
assert now() == before
assert not optional & set(sys.modules), optional & set(sys.modules)
assert "vestige" not in AttentionInterface().valid_keys()
from vestige.testing import tiny
model = tiny("llama")
assert "vestige" not in AttentionInterface().valid_keys()
with vestige.attach(model):
    assert "vestige" in AttentionInterface().valid_keys()
"""

HELP = """
import sys
from vestige.cli import main as cli
for words in ([], ["run"], ["demo"], ["models"], ["policies"], ["memories"], ["bench"], ["bench", "speed"]):
    sys.argv = ["vestige", *words, "--help"]
    try:
        cli.main()
    except SystemExit as stop:
        assert stop.code == 0, words
sys.argv = ["vestige", "models"]
try:
    cli.main()
except SystemExit as stop:
    assert stop.code == 0
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""


def fresh(script: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_vestige_loads_no_backend_and_patches_nothing():
    fresh(IMPORTS)


def test_help_of_each_command_does_not_import_torch():
    assert fresh(HELP).count("Usage: vestige") == 8
