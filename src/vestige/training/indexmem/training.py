"""``vestige train indexmem``: from texts to an indexer and memories with their card, in one folder that all take."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.nn.indexer import Indexer
from vestige.nn.latent_memory import Kind, Latent
from vestige.training.data.sentences import split_documents
from vestige.training.indexmem.task import IndexMemOptions, IndexMemTask
from vestige.training.loop import Outcome
from vestige.training.trainer import Job, Training


@dataclass(frozen=True)
class IndexMemWeights:
    """Both halves of IndexMem, an indexer and memories, written side by side."""

    indexer: Indexer
    latents: Sequence[Latent]

    def save(self, folder: Path) -> None:
        """Write safetensors and JSON of all."""
        self.indexer.save(folder)
        for latent in self.latents:
            latent.save(folder)


@dataclass(frozen=True, kw_only=True)
class IndexMemTraining(Training):
    """What an indexer and memories are trained on, and how, beside what every training says; it validates on tales.

    Args:
        options: Of sequences and loss.
        heads: Index heads for each KV head.
        dim: Size of each KV head's part of the index key.
        apart: Whether each KV head has scores of its own.
        memories: Kinds of memories.
        width: Of their projections; None takes each kind's own.
        decays: Whether older pairs count less in them.
        asks: Whether the linear one's gate looks at the query.
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

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job) -> Outcome:
        sides = self.sides()
        prose, held = (split_documents(side) for side in sides)
        torch.manual_seed(self.loop.seed)
        shapes: dict[str, dict[str, Any]] = {
            "indexer": {"heads": self.heads, "dim": self.dim, "apart": self.apart},
            "memory": {"width": self.width, "decays": self.decays, "asks": self.asks},
        }
        indexer = Indexer.fresh(model, **shapes["indexer"])
        latents = [Latent.fresh(model, kind, **shapes["memory"]) for kind in self.memories]
        task = IndexMemTask(model, tokenizer, indexer, latents, prose, held, self.options, validation=self.validation)
        return job.carry_out(
            task,
            self.loop,
            IndexMemWeights(indexer, latents),
            self.weights,
            what="IndexMem's indexer and latent memory (arXiv 2605.25475), and slots: what is asked for, what it was",
            documents=[one for side in sides for one in side],
            options=asdict(self.options),
            memories=list(self.memories),
            **shapes,
        )
