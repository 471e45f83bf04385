"""Documents: where they come from, which are held out for benchmarks, on which side they are, windows of them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import byte_level_tokenizer
from vestige import InputError
from vestige.bench import hub
from vestige.bench.tasks import TaskSpec, sources
from vestige.training.data import documents as module
from vestige.training.data.documents import Document, draw_windows, read_documents, split_documents, split_lines
from vestige.training.sampler import make_generator


@pytest.fixture
def notices(monkeypatch) -> list[str]:
    heard: list[str] = []
    monkeypatch.setattr(module, "_print_error", heard.append)
    return heard


def filled(folder: Path, count: int, suffix: str = ".txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        (folder / f"t{n:02d}{suffix}").write_text(f"text {n}")
    return folder


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def longbench(count: int, **changes: Any) -> list[dict[str, Any]]:
    made = {"input": "", "answers": ["a"], "length": 9, "dataset": "multi_news", "language": "en", "all_classes": None}
    return [made | {"context": f"context {n}", "_id": str(n)} | changes for n in range(count)]


def test_texts_markdown_folders_and_jsonl_are_documents(tmp_path, notices):
    folder = filled(tmp_path / "texts", 2)
    (folder / "notes.md").write_text("# notes")
    (folder / "data.csv").write_text("not read")
    lines = jsonl(tmp_path / "more.jsonl", [{"text": "one\u2028line"}, {"text": " \n"}, {"text": "last"}])
    found = read_documents([folder, str(tmp_path / "texts" / "t00.txt"), lines])
    assert [Path(d.name).name for d in found[:4]] == ["notes.md", "t00.txt", "t01.txt", "t00.txt"]
    assert [d.text for d in found] == ["# notes", "text 0", "text 1", "text 0", "one\u2028line", "last"]
    assert found[-1].name == f"{lines}, line 3" and notices == []


def test_another_field_can_be_named(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"body": "b", "text": "t"}])
    assert [d.text for d in read_documents([path], field="body")] == ["b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n[1]\n', r"a.jsonl, line 2: not a JSON object but \[1\]"),
        ('{"text": "a"}\n\n{"body": "b"}\n', "a.jsonl, line 3: 'text' is missing; there is body"),
        ('{"text": 3}\n', "a.jsonl, line 1: 'text' is not a text but 3"),
        ("{oops\n", "a.jsonl, line 1: not JSON"),
        ("", "a.jsonl is empty"),
        ('{"text": " "}\n', "there is nothing to train on in .*a.jsonl"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=words) as error:
        read_documents([tmp_path / "a.jsonl"])
    assert "\n" not in str(error.value)


def test_missing_empty_and_other_files_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.bin").write_text("x")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InputError, match="no such file or folder: .*nowhere"):
        read_documents([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="there is nothing to train on in .*empty"):
        read_documents([tmp_path / "empty"])
    with pytest.raises(InputError, match="a.bin is not a kind of file to train on: .txt, .md, .jsonl, or a folder"):
        read_documents([tmp_path / "a.bin"])
    with pytest.raises(InputError, match="a.txt is empty"):
        read_documents([tmp_path / "a.txt"])
    with pytest.raises(InputError, match="name data to train on"):
        read_documents([])


def test_training_texts_and_benchmark_essays_share_nothing_and_miss_nothing(tmp_path, notices):
    folder = filled(tmp_path / "essays", 49)
    trained = {d.text for d in read_documents([folder])}
    used = {
        text
        for side in ("dev", "test")
        for text in sources.essays(TaskSpec(count=len, measure=len, split=side, essays=folder))
    }
    assert used == {f"text {n}" for n in range(4, 49, 5)} and not trained & used
    assert trained | used == {f"text {n}" for n in range(49)}
    assert notices == [f"{folder}: 9 of 49 documents are left out, they are for benchmarks only"]


def test_a_file_named_alone_is_judged_by_its_place_in_its_folder(tmp_path, monkeypatch, notices):
    folder = filled(tmp_path / "essays", 12)
    monkeypatch.chdir(folder)
    assert [d.text for d in read_documents(["t03.txt", "t04.txt", folder / "t09.txt", "t10.txt"])] == [
        "text 3",
        "text 10",
    ]
    assert len(notices) == 2 and notices[0].startswith("t04.txt: 1 of 1 documents are left out")
    with pytest.raises(InputError, match="nothing to train on in t04.txt: no text, or only what is for benchmarks"):
        read_documents(["t04.txt"])


def test_markdown_and_folders_of_few_texts_lose_nothing(tmp_path, notices):
    assert len(read_documents([filled(tmp_path / "few", 9)])) == 9
    assert len(read_documents([filled(tmp_path / "md", 20, ".md")])) == 20
    mixed = filled(filled(tmp_path / "mixed", 10), 10, ".md")
    assert len(read_documents([mixed])) == 18 and len(notices) == 1


def test_the_second_half_of_each_longbench_set_is_left_out(tmp_path, notices):
    path = jsonl(tmp_path / "multi_news.jsonl", longbench(200))
    assert [d.text for d in read_documents([path], field="context")] == [f"context {n}" for n in range(100)]
    assert notices == [f"{path}: 100 of 200 documents are left out, they are for benchmarks only"]
    both = longbench(3) + longbench(4, dataset="qmsum_e", context="q")
    counts = Counter(d.text for d in read_documents([jsonl(tmp_path / "both.jsonl", both)], field="context"))
    assert counts == {"context 0": 1, "context 1": 1, "q": 2}


def test_whole_benchmarks_are_refused(tmp_path):
    squad = {"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": []}]}], "version": "1.1"}
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    (tmp_path / "hotpot.json").write_text(json.dumps([{"question": "q", "context": []}]))
    ruler = jsonl(tmp_path / "niah.jsonl", [{"index": 0, "input": "i", "outputs": ["o"], "length": 9}])
    inside = jsonl(tmp_path / "ruler" / "x.jsonl", [{"text": "t"}])
    choices = {f"choice_{letter}": "c" for letter in "ABCD"}
    second = jsonl(tmp_path / "v2.jsonl", [{"context": "c", "question": "q", **choices}])
    for path, words in (
        (tmp_path / "squad.json", "squad.json is in SQuAD's format, which is for benchmarks only"),
        (tmp_path / "hotpot.json", "hotpot.json is in HotpotQA's or .* format, which is for benchmarks only"),
        (ruler, "niah.jsonl, line 1: a sample in RULER's format, which is for benchmarks only"),
        (inside, "x.jsonl is RULER's, which is for benchmarks only"),
        (inside.parent, "ruler is RULER's, which is for benchmarks only"),
        (second, "v2.jsonl, line 1: a sample in LongBench v2's format"),
    ):
        with pytest.raises(InputError, match=words):
            read_documents([path], field="input")


def test_what_is_left_out_is_said_on_stderr_or_to_the_caller(tmp_path, capsys):
    folder = filled(tmp_path / "essays", 10)
    heard: list[str] = []
    read_documents([folder], notice=heard.append)
    assert capsys.readouterr() == ("", "") and len(heard) == 1
    read_documents([folder])
    said = capsys.readouterr()
    assert said.out == "" and said.err == f"{heard[0]}\n" and "2 of 10" in said.err


@pytest.fixture
def fetched(monkeypatch) -> list[tuple]:
    """Stand in for the hub: twenty rows of anything."""
    asked: list[tuple] = []

    def fetch(*words: Any) -> list[dict[str, str]]:
        asked.append(words[:3])
        return [{"text": f"row {n}" if n != 2 else ""} for n in range(20)]

    monkeypatch.setattr(hub, "fetch", fetch)
    return asked


def test_a_set_on_the_hub_is_rows_of_a_config_and_split(fetched, notices):
    for source in ("hub:owner/name", "hub:owner/name:small", "hub:owner/name::train[:20]", "hub:owner/name:small:test"):
        found = read_documents([source])
        assert len(found) == 19 and found[2] == Document("owner/name, row 3", "row 3")
    assert [words[1:] for words in fetched] == [
        (None, "train"),
        ("small", "train"),
        (None, "train[:20]"),
        ("small", "test"),
    ]
    assert notices == []


def test_the_benchmarks_sets_on_the_hub_are_refused_before_they_are_fetched(fetched, notices):
    for source, split_name in (
        ("hub:rajpurkar/squad::validation", "validation"),
        ("hub:rajpurkar/squad::validation[:50]", "validation"),
        ("hub:hotpotqa/hotpot_qa:distractor:validation", "validation"),
        ("hub:Xnhyacinth/LongBench:lcc:test", "test"),
    ):
        with pytest.raises(InputError, match=f"the {split_name} split of .* is for benchmarks only"):
            read_documents([source])
    with pytest.raises(InputError, match="every fifth text of .* take the split train, not 'train.:9.'"):
        read_documents([f"hub:{sources.ESSAYS_SET}::train[:9]"])
    assert fetched == []
    kept = [d.text for d in read_documents([f"hub:{sources.ESSAYS_SET}"])]
    assert not {"row 4", "row 9", "row 14", "row 19"} & set(kept) and len(kept) == 20 - 4 - 1
    assert "4 of 20 documents are left out" in notices[0]


def test_without_datasets_the_pip_line_is_given(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        InputError, match=r'fetching owner/name needs datasets: pip install "vestige\[bench\]"; or give'
    ):
        read_documents(["hub:owner/name"])


def texts(count: int) -> list[Document]:
    return [Document(f"d{n}", f"text {n}") for n in range(count)]


def test_sides_follow_from_the_text_whatever_the_order_and_what_else_is_there():
    train_on, validate_on = split_documents(texts(400), share=0.2)
    assert 50 < len(validate_on) < 110 and sorted(d.name for d in train_on + validate_on) == sorted(
        d.name for d in texts(400)
    )
    backwards = split_documents(texts(400)[::-1], share=0.2)
    assert set(backwards[0]) == set(train_on) and backwards[0] == train_on[::-1]
    more = split_documents([*texts(600), Document("other name", "text 7")], share=0.2)
    assert set(train_on) <= set(more[0]) and set(validate_on) <= set(more[1])


def test_equal_texts_are_one_document_so_that_no_side_has_the_others():
    train_on, validate_on = split_documents([Document(f"d{n}", f"text {n % 5}") for n in range(20)], share=0.5)
    assert sorted(d.name for d in train_on + validate_on) == ["d0", "d1", "d2", "d3", "d4"]


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_no_side_is_empty_if_there_are_two_documents(share):
    for start in range(20):
        train_on, validate_on = split_documents([Document("", f"{start}"), Document("", f"{start} too")], share=share)
        assert len(train_on) == len(validate_on) == 1
    assert split_documents(texts(1), share=share) == (texts(1), [])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(InputError, match="must lie between 0 and 1, got"):
        split_documents(texts(3), share=share)


def test_nothing_cannot_be_split():
    with pytest.raises(InputError, match="there are no documents to split"):
        split_documents([])


def test_lines_can_be_documents():
    lines = split_lines(Document("reviews.txt", "good\n\nbad\u2028still\n"))
    assert lines == [Document("reviews.txt, line 1", "good"), Document("reviews.txt, line 3", "bad\u2028still")]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer(None)


def test_windows_are_pieces_at_random_places_that_follow_from_the_generator(tokenizer):
    document = Document("d", " ".join(map(str, range(300))))
    ids = tokenizer(document.text)["input_ids"]
    cut = draw_windows(document, tokenizer, size=20, count=50, generator=make_generator(0))
    assert cut.shape == (50, 20) and cut.dtype == torch.long
    starts = [next(i for i in range(len(ids)) if ids[i : i + 20] == row) for row in cut.tolist()]
    assert len(set(starts)) > 25 and min(starts) < len(ids) / 5 and max(starts) > len(ids) * 3 / 5
    again, other = (draw_windows(document, tokenizer, size=20, count=50, generator=make_generator(n)) for n in (0, 1))
    assert cut.equal(again) and not cut.equal(other)


def test_a_window_may_be_the_whole_document_and_no_more(tokenizer):
    document = Document("short.txt", "A short text.")
    ids = tokenizer(document.text)["input_ids"]
    assert draw_windows(document, tokenizer, size=len(ids), generator=make_generator(0)).tolist() == [ids]
    with pytest.raises(InputError, match=f"short.txt has {len(ids)} tokens, fewer than a window of {len(ids) + 1}"):
        draw_windows(document, tokenizer, size=len(ids) + 1, generator=make_generator(0))
    with pytest.raises(InputError, match="windows need a size and a count of at least 1, got 0 and 1"):
        draw_windows(document, tokenizer, size=0, generator=make_generator(0))
    with pytest.raises(InputError, match="x has 0 tokens"):
        draw_windows(Document("x", ""), tokenizer, size=1, generator=make_generator(0))
