"""What several test files share: a tiny model with a small real tokenizer, saved as a user would have it."""

import json
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from vestige import Budget, ModelError, Policy, policies
from vestige.cli import main as cli
from vestige.models.gguf_wheels import is_cached
from vestige.models.layout import check
from vestige.nn import pretrained
from vestige.nn.indexer import Indexer
from vestige.nn.latent_memory import Kind, Latent
from vestige.nn.retention_gates import Gates
from vestige.testing import tiny

CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]


on_the_default_model = pytest.mark.skipif(
    not is_cached("smollm2-135m"), reason="the default model is not here yet: run `make demo` first"
)


def byte_level_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, trained on the spot: it can say any text and gives it back unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["The keeper of the harbour lamp lights it at dusk.\n"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def random_gates(model: PreTrainedModel, *, seed: int = 0, **shape: Any) -> Gates:
    """Return gates that tell pairs far apart, though nobody trained them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gates = Gates.initialize(model, **{"width": 8, "bias": 3.0} | shape)
        with torch.no_grad():
            for linear in gates.modules():
                if isinstance(linear, torch.nn.Linear):
                    linear.weight.normal_()
    return gates


def random_indexer(model: PreTrainedModel, *, seed: int = 0, **shape: Any) -> Indexer:
    """Return an indexer that tells pairs far apart, though nobody trained it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        indexer = Indexer.initialize(model, **{"dim": 4, "apart": True} | shape)
        with torch.no_grad():
            for weight in indexer.layers.parameters():
                weight.normal_()
            indexer.log_scales.normal_()
    return indexer


def random_latent(model: PreTrainedModel, kind: Kind = "linear", *, seed: int = 0, **shape: Any) -> Latent:
    """Return a memory's weights that nobody trained, its gate half open."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        latent = Latent.initialize(model, kind=kind, **{"width": 8} | shape).requires_grad_(False)
        for gate in (layer.gate for layer in latent.layers if layer.gate is not None):
            gate.zero_()
    return latent


MADE: dict[str, Any] = {
    "retention": (random_gates,),
    "indexmem": (random_indexer, random_latent, partial(random_latent, kind="slots")),
}
"""What is drawn for a model of which no weights of that kind are shipped."""


@pytest.fixture(scope="session", autouse=True)
def shipped_weights(tmp_path_factory: pytest.TempPathFactory):
    """Have random weights where a model without any would be refused, so that all policies run on tiny models."""
    root = tmp_path_factory.mktemp("gates")

    get = pretrained.WeightsCache.get

    def get_or_draw(cache: pretrained.WeightsCache, name: str | None, model: PreTrainedModel) -> Any:
        own = f"{cache.kind}-{check(model).fingerprint()}"
        if name is not None or cache.kind not in MADE or (pretrained.SHIPPED / own).exists():
            return get(cache, name, model)
        folder = root / own
        if not folder.exists():
            for draw in MADE[cache.kind]:
                draw(model).save(folder)
        return get(cache, str(folder), model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained.WeightsCache, "get", get_or_draw)
        yield


@pytest.fixture
def unchecked():
    """Let a wrong type through, as it comes from a user without a type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@dataclass(frozen=True)
class TinyFolders:
    """A tiny llama of 512 positions in two folders that differ in the chat template."""

    chat: Path
    plain: Path
    """Without a chat template."""
    other: Path
    """Like ``chat``, with other weights."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> TinyFolders:
    """Save the tiny models once; tests must not change the folders."""
    root = tmp_path_factory.mktemp("models")
    made = TinyFolders(root / "chat", root / "plain", root / "other")
    chat, plain = byte_level_tokenizer(CHAT), byte_level_tokenizer(None)
    logging.disable_progress_bar()
    tiny("llama", vocab_size=len(chat), seed=6).save_pretrained(made.chat)  # a seed whose replies differ
    tiny("llama", vocab_size=len(chat), seed=1).save_pretrained(made.other)
    logging.enable_progress_bar()
    shutil.copytree(made.chat, made.plain)
    for folder, tokenizer in ((made.chat, chat), (made.other, chat), (made.plain, plain)):
        tokenizer.save_pretrained(folder)
    return made


@pytest.fixture(scope="session")
def chatter(folders: TinyFolders) -> tuple[PreTrainedModel, Any]:
    """Load the tiny model with a chat template, and its tokenizer."""
    from vestige.models.loading import load

    return load(folders.chat)


@pytest.fixture
def story() -> str:
    """Return a text of about 250 tokens for the tiny tokenizer."""
    lines = (f"Line {n}: the keeper of lamp {n * n} is called {n:x}{'aeiou'[n % 5]}." for n in range(10))
    return "\n".join(lines)


@dataclass(frozen=True)
class Outcome:
    """What one command left."""

    code: int
    out: str
    err: str

    @property
    def row(self):
        """The object that --json prints last."""
        return json.loads(self.out.splitlines()[-1])

    def complaint(self) -> str:
        """Return the one line that bad input is answered with."""
        assert self.code == 2, self
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        assert self.err.endswith("\n") and "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def vestige(monkeypatch, capsys):
    """Run a command in this process."""

    def call(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["vestige", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return Outcome(stop.value.code, said.out, said.err)

    return call


@pytest.fixture
def place(tmp_path, monkeypatch, story) -> Path:
    """Work in a folder of its own that holds story.txt."""
    monkeypatch.chdir(tmp_path)
    Path("story.txt").write_text(story)
    return tmp_path


@pytest.fixture
def texts(place: Path) -> Path:
    """Return a folder with three texts to train on."""
    said = " ".join(f"Sentence number {i} says that the year {1000 + 7 * i} was calm." for i in range(20))
    (place / "texts").mkdir()
    for n in range(3):
        (place / "texts" / f"{n}.txt").write_text(f"Text {n} begins with these words. {said}")
    return place / "texts"


@pytest.fixture
def roomy(folders: TinyFolders, place: Path) -> Path:
    """Return the folder of the tiny model with a chat template and 1024 positions, which is room for a replay."""
    shutil.copytree(folders.chat, place / "roomy")
    config = json.loads((place / "roomy" / "config.json").read_text())
    (place / "roomy" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return place / "roomy"


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


ROOMY = Budget.tokens(64)


def made(name: str, **options: Any) -> Policy:
    """Return a named policy with a budget that never refuses, and other options."""
    return policies.resolve(name)(budget=None if name == "full" else ROOMY, **options)


def no_pip(*args):
    pytest.fail("something was downloaded")


def fails(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text
