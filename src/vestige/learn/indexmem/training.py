"""``vestige train indexmem``: from texts to an indexer and a memory with their card, in one folder that both take."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.indexer import Indexer
from vestige.latent import Fusion, Latent
from vestige.learn.indexmem.task import IndexMemOptions, IndexMemTask
from vestige.learn.job import Job, Training
from vestige.learn.loop import Trained
from vestige.learn.prose import prose_of


@dataclass(frozen=True)
class Both:
    """An indexer and a memory, written side by side."""

    indexer: Indexer
    latent: Latent

    def save(self, folder: Path) -> None:
        """Write safetensors and JSON of both."""
        self.indexer.save(folder)
        self.latent.save(folder)


@dataclass(frozen=True, kw_only=True)
class IndexMemTraining(Training):
    """What an indexer and a memory are trained on, and how, beside what every training says; it validates on tales.

    Args:
        options: Of sequences and loss.
        heads: Index heads for each KV head.
        dim: Size of each KV head's part of the index key.
        apart: Whether each KV head has scores of its own.
        width: Of the memory's projection.
        fusion: Whether what the memory says is added or merged.
        decays: Whether older pairs count less in it.
        asks: Whether its gate looks at the query.
    """

    weights: ClassVar[str] = "indexmem"
    options: IndexMemOptions
    heads: int = 1
    dim: int = 8
    apart: bool = True
    width: int = 32
    fusion: Fusion = "added"
    decays: bool = False
    asks: bool = False
    validation: int = 16

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job) -> Trained:
        sides = self.sides()
        prose, held = (prose_of(side) for side in sides)
        torch.manual_seed(self.loop.seed)
        shapes: dict[str, dict[str, Any]] = {
            "indexer": {"heads": self.heads, "dim": self.dim, "apart": self.apart},
            "latent": {"width": self.width, "fusion": self.fusion, "decays": self.decays, "asks": self.asks},
        }
        indexer, latent = Indexer.fresh(model, **shapes["indexer"]), Latent.fresh(model, **shapes["latent"])
        task = IndexMemTask(model, tokenizer, indexer, latent, prose, held, self.options, validation=self.validation)
        return job.carry_out(
            task,
            self.loop,
            Both(indexer, latent),
            self.weights,
            what="IndexMem's indexer and latent memory (arXiv 2605.25475): what will be asked for, and what it was",
            documents=[one for side in sides for one in side],
            options=asdict(self.options),
            **shapes,
        )
