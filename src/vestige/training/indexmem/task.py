"""The task that trains IndexMem: first the indexer, then also memories of the pairs that it would evict.

Source: IndexMem, arXiv 2605.25475: two stages, and a frozen model. No gradient passes through the model, so a step
costs one reading. The sequences are synthetic texts with questions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.budget import Budget
from vestige.errors import InputError, unknown_name_message
from vestige.models.layout import check
from vestige.nn.indexer import Indexer
from vestige.nn.latent_memory import Kind, Latent
from vestige.policies.indexmem import IndexMem
from vestige.training.data.sentences import Texts
from vestige.training.data.synthetic_qa.sequences import TokenizedDocument
from vestige.training.data.synthetic_qa.task import StoryOptions, StoryTask, average_over_documents, draw_share
from vestige.training.data.synthetic_qa.validation import evaluate
from vestige.training.indexmem.indexer_loss import TEACHERS, attention_to_text, indexer_loss
from vestige.training.indexmem.memory_loss import make_memory, memory_loss, select_pairs
from vestige.training.indexmem.teacher_trace import trace_text
from vestige.training.trainer import Made, Training

_WHAT = "IndexMem's indexer and latent memory (arXiv 2605.25475), and slots: what is asked for, what it was"
_MEASURED = 4
"""Sequences on which the scale of each KV head is measured."""


@dataclass(frozen=True, kw_only=True)
class IndexMemOptions(StoryOptions):
    """Options of the sequences and the loss.

    Raises:
        InputError: A number is out of range, or the teacher is unknown.
    """

    teacher: str = "answers"
    """Attention that the indexer predicts: of the tokens after a text, or as in the paper of the text itself."""
    aware: float = 0.5
    """Share of the texts whose first question the indexer reads too; it then predicts the attention of its answer."""
    alone: int = 0
    """First sequences, from which only the indexer learns; a multiple of the batch."""
    memory_weight: float = 0.3
    """Weight of the memories' errors."""
    sink: int = 4
    """First tokens of a text, which are always kept."""
    window: int = 32
    """Latest tokens of a text, which are always kept."""

    def __post_init__(self) -> None:
        if self.teacher not in TEACHERS:
            raise InputError(unknown_name_message("teacher", str(self.teacher), TEACHERS))
        if not 0 <= self.aware <= 1 or not 0 < self.budget <= 1:
            raise InputError(f"aware must lie in [0, 1] and budget in (0, 1], got {self.aware} and {self.budget}")
        if not math.isfinite(self.memory_weight):
            raise InputError(f"memory_weight must be a number, got {self.memory_weight}")
        if min(self.alone, self.sink, self.window, self.memory_weight) < 0 or self.asked < 1:
            raise InputError("alone, sink, window and memory_weight must not be negative, and asked at least 1")


class IndexMemTask(StoryTask):
    """A task that trains IndexMem: a stream of sequences, each a function of its index alone.

    Args:
        indexer: Trained; the constructor measures its scales.
        latents: Trained weights of memories, each of another kind.

    The other arguments and the errors are those of :class:`StoryTask`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        indexer: Indexer,
        latents: Sequence[Latent],
        texts: Texts,
        held_out: Texts,
        options: IndexMemOptions,
        *,
        validation: int = 16,
    ) -> None:
        super().__init__(model, tokenizer, texts, held_out, options, validation=validation)
        self.options, self.indexer = options, indexer
        self.latents = {latent.config.kind: latent for latent in latents}
        self.module = nn.ModuleDict({"indexer": indexer, **{str(kind): one for kind, one in self.latents.items()}})
        self._measure_scales()

    def loss(self, index: int) -> Mapping[str, Tensor]:
        """Return the loss of a sequence in its parts.

        A memory's part is its error as a share of the error without it; NaN while it does not learn.
        """
        packed = self.sequence("train", index)
        with_memory = index >= self.options.alone
        parts = average_over_documents(packed, lambda document: self._loss_of(document, with_memory=with_memory))
        loss = parts["index"] + self.options.memory_weight * parts.pop("memory")
        return {"loss": loss, **parts, "tokens": loss.new_tensor(float(packed.ids.shape[1]))}

    def validate(self) -> Mapping[str, float]:
        """Return loss and accuracy of answers after a real eviction, without and with each memory."""
        options, samples = self.options, self._validation_samples
        policy = IndexMem(
            budget=Budget.fraction(options.budget),
            indexer=self.indexer,
            share="model" if self.indexer.config.apart else "head",
            sink=options.sink,
            window=options.window,
        )
        found = dict(evaluate(self.model, policy, samples))
        for kind, latent in self.latents.items():
            with_memory = evaluate(self.model, policy, samples, make_memory(latent))
            found |= {f"{name}_{kind}": value for name, value in with_memory.items() if name != "answers"}
        return found

    def identity(self) -> Mapping[str, Any]:
        """Return the identity of model and data, the shapes and the options."""
        return {
            **super().identity(),
            "indexer": asdict(self.indexer.config),
            "latents": [asdict(latent.config) for latent in self.latents.values()],
            "options": asdict(self.options),
        }

    def _loss_of(self, document: TokenizedDocument, *, with_memory: bool) -> dict[str, Tensor]:
        options, text = self.options, document.text
        sink = min(options.sink, text - 1)
        aware = bool(torch.rand(()) < options.aware)
        predicted = _find_first_reply(document) if aware else slice(text, document.ids.shape[1])
        fraction = draw_share()
        layers = trace_text(self.model, document.ids)
        index = indexer_loss(self.indexer, layers, text, predicted, teacher=options.teacher, sink=sink)
        latents = list(self.latents.values())
        if not with_memory or not latents:  # every parameter needs a gradient in every step
            nothing = torch.stack([index.new_zeros(()), *map(_zero_loss, latents)]).sum()
            return {"index": index, "memory": nothing, **dict.fromkeys(self.latents, index.new_tensor(math.nan))}
        kept = select_pairs(self.indexer, layers, text, fraction, sink=sink, window=options.window)
        errors, without = memory_loss(latents, layers, kept)
        shares = (errors / without.clamp_min(1e-12)).detach()
        return {"index": index, "memory": errors.sum(), **dict(zip(self.latents, shares, strict=True))}

    @torch.no_grad()
    def _measure_scales(self) -> None:
        """Set the indexer's scales: the total importance of the tokens of a KV head.

        A scale is the log of the attention to a text after its first tokens, each token counted with the largest that
        any later token pays, times the median norm of a value after the output projection.
        """
        anatomy = check(self.model)
        norms: dict[int, list[Tensor]] = {}
        paid: dict[int, list[Tensor]] = {}
        for document in (one for i in range(_MEASURED) for one in self.sequence("measured", i).documents()):
            following = slice(document.text, document.ids.shape[1])
            for layer in trace_text(self.model, document.ids):
                norm = anatomy.output(layer.layer_idx).norms(layer.values[None])[0].mean(-1)  # over the query group
                norms.setdefault(layer.layer_idx, []).append(norm)
                sink = min(self.options.sink, document.text - 1)
                attention = attention_to_text(layer, document.text, following, sink).sum(-1)
                paid.setdefault(layer.layer_idx, []).append(attention.view(len(layer.keys), -1).mean(1))
        for place, layer_idx in enumerate(self.indexer.config.layers):
            scales = torch.cat(norms[layer_idx], 1).median(1).values * torch.stack(paid[layer_idx]).mean(0)
            self.indexer.log_scales[place, : len(scales)] = scales.clamp_min(math.exp(-20)).log()


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
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts, held_out: Texts
    ) -> Made:
        shapes: dict[str, dict[str, Any]] = {
            "indexer": {"heads": self.heads, "dim": self.dim, "apart": self.apart},
            "memory": {"width": self.width, "decays": self.decays, "asks": self.asks},
        }
        indexer = Indexer.initialize(model, **shapes["indexer"])
        latents = [Latent.initialize(model, kind=kind, **shapes["memory"]) for kind in self.memories]
        task = IndexMemTask(
            model, tokenizer, indexer, latents, texts, held_out, self.options, validation=self.validation
        )
        card = {"what": _WHAT, "options": asdict(self.options), "memories": list(self.memories), **shapes}
        return task, [indexer, *latents], card


def _find_first_reply(document: TokenizedDocument) -> slice:
    """Return the positions that predict the answer to a document's first question."""
    answers = document.answers
    ends = [*(answers.diff() > 1).nonzero()[:1, 0].tolist(), len(answers) - 1]
    return slice(int(answers[0]), int(answers[ends[0]]) + 1)


def _zero_loss(module: nn.Module) -> Tensor:
    return torch.stack([0 * parameter.sum() for parameter in module.parameters()]).sum()
