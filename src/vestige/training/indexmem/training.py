"""``vestige train indexmem``: train an indexer and memories on texts, and write them with their card to one folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.nn.indexer import Indexer
from vestige.nn.latent_memory import Kind, Latent
from vestige.training.data.documents import Document
from vestige.training.data.sentences import split_all_sentences
from vestige.training.indexmem.task import IndexMemOptions, IndexMemTask
from vestige.training.task import Task
from vestige.training.trainer import Training, Weights

_WHAT = "IndexMem's indexer and latent memory (arXiv 2605.25475), and slots: what is asked for, what it was"


@dataclass(frozen=True)
class IndexMemWeights:
    """The indexer and the memories, written to one folder."""

    indexer: Indexer
    latents: Sequence[Latent]

    def save(self, folder: Path) -> None:
        """Write safetensors and JSON of both."""
        self.indexer.save(folder)
        for latent in self.latents:
            latent.save(folder)


@dataclass(frozen=True, kw_only=True)
class IndexMemTraining(Training):
    """Options of ``vestige train indexmem``, beside those of every training; it validates on synthetic questions.

    Args:
        options: Options of sequences and loss.
        heads: Index heads for each KV head.
        dim: Size of each KV head's part of the index key.
        apart: Whether each KV head has scores of its own.
        memories: Kinds of memories.
        width: Width of their projections; None takes each kind's default.
        decays: Whether older pairs count less in the memories.
        asks: Whether the linear memory's gate sees the query.
    """

    weights: ClassVar[str] = "indexmem"
    options: IndexMemOptions
    heads: int = 1
    dim: int = 8
    apart: bool = True
    memories: tuple[Kind, ...] = ("linear", "slots")
    width: int | None = None
    decays: bool = False
    asks: bool = False
    validation: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole_steps(self.options.alone, "the indexer alone")
        if self.memories and self.options.alone >= self.loop.steps * self.loop.batch:
            raise InputError(
                f"memories would learn nothing: the indexer learns alone in the first {self.options.alone} sequences, "
                f"and there are {self.loop.steps * self.loop.batch}"
            )

    def make_task(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        documents: Sequence[Document],
        held_out: Sequence[Document],
    ) -> tuple[Task, Weights, dict[str, Any]]:
        texts, unseen = split_all_sentences(documents), split_all_sentences(held_out)
        shapes: dict[str, dict[str, Any]] = {
            "indexer": {"heads": self.heads, "dim": self.dim, "apart": self.apart},
            "memory": {"width": self.width, "decays": self.decays, "asks": self.asks},
        }
        indexer = Indexer.initialize(model, **shapes["indexer"])
        latents = [Latent.initialize(model, kind=kind, **shapes["memory"]) for kind in self.memories]
        task = IndexMemTask(model, tokenizer, indexer, latents, texts, unseen, self.options, validation=self.validation)
        card = {
            "what": _WHAT,
            "options": asdict(self.options),
            "memories": list(self.memories),
            **shapes,
        }
        return task, IndexMemWeights(indexer, latents), card
