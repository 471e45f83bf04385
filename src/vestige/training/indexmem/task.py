"""IndexMem as something to train: first the indexer, then memories of what it would evict along with it.

Source: IndexMem, arXiv 2605.25475: two stages, the model frozen. Nothing is backpropagated through the model, so a step
costs one reading. Sequences are tales: texts with questions behind them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.budget import Budget
from vestige.errors import InputError
from vestige.models.anatomy import check
from vestige.nn.indexer import Indexer
from vestige.nn.latent_memory import Latent
from vestige.policies.indexmem import IndexMem
from vestige.training.data.synthetic_qa.sequences import TokenizedDocument
from vestige.training.data.synthetic_qa.shares import drawn_share
from vestige.training.data.synthetic_qa.task import StoryTask, average_over_documents
from vestige.training.data.synthetic_qa.validation import evaluate
from vestige.training.indexmem.indexer_loss import Teacher, attention_to_text, indexer_loss, teacher_of
from vestige.training.indexmem.memory_loss import make_memory, memory_loss, select_pairs
from vestige.training.indexmem.teacher_trace import trace_text

_MEASURED = 4
"""Sequences on which the size of each KV head's output is measured."""


@dataclass(frozen=True, kw_only=True)
class IndexMemOptions:
    """What sequences look like, and the loss.

    Raises:
        InputError: A number out of range, or an unknown teacher.
    """

    length: int = 1024
    """Most tokens of a sequence, of one document or of several."""
    least: int = 160
    """Fewest tokens that a document is given; lengths between are drawn evenly by their logarithm."""
    asked: int = 4
    """Most questions about one text."""
    teacher: Teacher = "answers"
    """What the indexer foretells: what is behind a text looks at, or as in the paper what the text itself does."""
    aware: float = 0.5
    """Share of the texts whose first question the indexer sees too, and then foretells its answer."""
    alone: int = 0
    """Sequences, the first ones, that only the indexer learns from; a multiple of the batch."""
    memory_weight: float = 0.3
    """Of the memories' errors."""
    sink: int = 4
    """First tokens of a text, which are always kept."""
    window: int = 32
    """Its latest tokens, which are always kept."""
    budget: float = 0.1
    """Share of the pairs that is kept when answers are validated."""
    seed: int = 0

    def __post_init__(self) -> None:
        teacher_of(self.teacher)
        if not 0 <= self.aware <= 1 or not 0 < self.budget <= 1:
            raise InputError(f"aware must lie in [0, 1] and budget in (0, 1], got {self.aware} and {self.budget}")
        if not math.isfinite(self.memory_weight):
            raise InputError(f"memory_weight must be a number, got {self.memory_weight}")
        if min(self.alone, self.sink, self.window, self.memory_weight) < 0 or self.asked < 1:
            raise InputError("alone, sink, window and memory_weight must not be negative, and asked at least 1")


class IndexMemTask(StoryTask):
    """IndexMem as a :class:`~vestige.training.task.Task`: a stream of sequences, each a function of its index alone.

    Args:
        model: Frozen by this.
        tokenizer: The model's.
        indexer: Is trained; its scales are measured here.
        latents: Are trained, each of another kind.
        prose: Sentences to train on, by document.
        held: Sentences to validate on, by document.
        options: Of sequences and loss.
        validation: Tales to validate on.

    Raises:
        InputError: Sequences would be longer than the model can read, or their numbers do not go together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        indexer: Indexer,
        latents: Sequence[Latent],
        prose: Sequence[Sequence[str]],
        held: Sequence[Sequence[str]],
        options: IndexMemOptions,
        *,
        validation: int = 16,
    ) -> None:
        super().__init__(
            model,
            tokenizer,
            prose,
            held,
            length=options.length,
            least=options.least,
            others=0,
            asked=options.asked,
            seed=options.seed,
            validation=validation,
        )
        self.options, self.indexer = options, indexer
        self.latents = {latent.config.kind: latent for latent in latents}
        self._all = nn.ModuleDict({"indexer": indexer, **{str(kind): one for kind, one in self.latents.items()}})
        self._measure()

    @property
    def module(self) -> nn.Module:
        """Indexer and memories."""
        return self._all

    def loss(self, index: int) -> Mapping[str, Tensor]:
        """Return the loss of a sequence in its parts; a memory's is its error as a share of that without it, NaN while
        it does not learn."""
        packed = self.sequence("train", index)
        parts = average_over_documents(packed, lambda one: self._of(one, remember=index >= self.options.alone))
        loss = parts["index"] + self.options.memory_weight * parts.pop("memory")
        return {"loss": loss, **parts, "tokens": loss.new_tensor(float(packed.ids.shape[1]))}

    def validate(self) -> Mapping[str, float]:
        """Return how answers fare when pairs are really evicted, without and with the memory."""
        options = self.options
        policy = IndexMem(
            budget=Budget.fraction(options.budget),
            indexer=self.indexer,
            share="model" if self.indexer.config.apart else "head",
            sink=options.sink,
            window=options.window,
        )
        tales = self.to_validate()
        found = dict(evaluate(self.model, policy, tales))
        for kind, latent in self.latents.items():
            with_memory = evaluate(self.model, policy, tales, make_memory(latent))
            found |= {f"{name}_{kind}": value for name, value in with_memory.items() if name != "answers"}
        return found

    def identity(self) -> Mapping[str, Any]:
        """Return the model, the shapes, the options and the data."""
        return {
            **super().identity(),
            "indexer": asdict(self.indexer.config),
            "latents": [asdict(latent.config) for latent in self.latents.values()],
            "options": asdict(self.options),
        }

    def _of(self, one: TokenizedDocument, *, remember: bool) -> dict[str, Tensor]:
        options, text = self.options, one.text
        sink = min(options.sink, text - 1)
        aware = bool(torch.rand(()) < options.aware)
        told = _find_first_reply(one) if aware else slice(text, one.ids.shape[1])
        fraction = drawn_share()
        layers = trace_text(self.model, one.ids)
        index = indexer_loss(self.indexer, layers, text, told, teacher=options.teacher, sink=sink)
        latents = list(self.latents.values())
        if not remember or not latents:  # every parameter has a gradient in every step
            nothing = torch.stack([index.new_zeros(()), *map(_nothing, latents)]).sum()
            return {"index": index, "memory": nothing, **dict.fromkeys(self.latents, index.new_tensor(math.nan))}
        kept = select_pairs(self.indexer, layers, text, fraction, sink=sink, window=options.window)
        errors, without = memory_loss(latents, layers, kept)
        left = (errors / without.clamp_min(1e-12)).detach()
        return {"index": index, "memory": errors.sum(), **dict(zip(self.latents, left, strict=True))}

    @torch.no_grad()
    def _measure(self) -> None:
        """Set the indexer's scales: what all shares of a KV head are worth together.

        The log of how much attention is paid behind a text to all of it but its first tokens, each token counting with
        the most that it gets, times the median norm of a value after the output projection.
        """
        anatomy = check(self.model)
        norms: dict[int, list[Tensor]] = {}
        paid: dict[int, list[Tensor]] = {}
        for one in (one for i in range(_MEASURED) for one in self.sequence("measured", i).documents()):
            behind = slice(one.text, one.ids.shape[1])
            for layer in trace_text(self.model, one.ids):
                found = anatomy.output(layer.layer_idx).norms(layer.values[None])[0].mean(-1)  # over the query group
                norms.setdefault(layer.layer_idx, []).append(found)
                looked = attention_to_text(layer, one.text, behind, min(self.options.sink, one.text - 1)).sum(-1)
                paid.setdefault(layer.layer_idx, []).append(looked.view(len(layer.keys), -1).mean(1))
        for place, layer_idx in enumerate(self.indexer.config.layers):
            worth = torch.cat(norms[layer_idx], 1).median(1).values * torch.stack(paid[layer_idx]).mean(0)
            self.indexer.log_scales[place, : len(worth)] = worth.clamp_min(math.exp(-20)).log()


def _find_first_reply(one: TokenizedDocument) -> slice:
    """Return the places that say the answer to a document's first question."""
    ends = [*(one.answers.diff() > 1).nonzero()[:1, 0].tolist(), len(one.answers) - 1]
    return slice(int(one.answers[0]), int(one.answers[ends[0]]) + 1)


def _nothing(module: nn.Module) -> Tensor:
    return torch.stack([0 * parameter.sum() for parameter in module.parameters()]).sum()
