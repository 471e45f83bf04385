"""The task that trains the learned eraser to give the clean text's replies through the erased passages' own pairs.

Source: KVEraser, arXiv 2606.17034: the loss is the negative log-likelihood of the reply over the surrogate cache, which
is an option here. Differs: the loss is the divergence from the model's distribution over the clean text, on question
and reply, because the likelihood makes replies surer than the model's own (lab notes of 2026-11-23). Several queries
share an edit, as in use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.nn.lora import Adapter
from vestige.training.data.sentences import Texts
from vestige.training.eraser import differentiable_cache
from vestige.training.eraser.questions import read_questions, split_questions
from vestige.training.eraser.samples import EraserOptions, Sample, SampleMaker, Sources, TokenizedQuery
from vestige.training.sampler import derive_seed
from vestige.training.task import identify_model
from vestige.training.trainer import HELD_OUT, Made, Training

Logits = Float[Tensor, "inputs vocab"]
Figures = dict[str, Float[Tensor, ""]]
"""Figures of a query: NLL of the reply, divergence over reply and question, exact match."""


class EraserTask:
    """A task that trains the learned eraser: a stream of samples, each a function of its index alone.

    Args:
        model: Frozen by the constructor.
        tokenizer: The model's tokenizer, a fast one.
        adapter: The trained weights.
        sources: Training material.
        held_out: Validation material.
        options: Options of samples and loss.
        validation: Number of validation samples.
    """

    num_samples = None
    """The samples are an endless stream."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapter: Adapter,
        sources: Sources,
        held_out: Sources,
        options: EraserOptions,
        *,
        validation: int = 24,
    ) -> None:
        self.model, self.options = model.requires_grad_(False).eval(), options
        self.module = self.adapter = adapter
        self.maker = SampleMaker(model, tokenizer, options)
        self.sources, self.held_out, self.validation = sources, held_out, validation
        self._pool: dict[int, Sample] = {}

    def loss(self, index: int) -> Mapping[str, Tensor]:
        """Return the loss of a sample over the surrogate cache, averaged over its queries."""
        sample, options = self._sample(self.options.sample_number(index)), self.options
        figures = _average([_compare(query, logits) for query, logits in self._answer(sample)])
        weights = {"nll": options.nll, "kl": options.kl, "question_kl": options.question_kl}
        loss = torch.stack([weight * figures[name] for name, weight in weights.items()]).sum()
        return {"loss": loss, **figures, "tokens": loss.new_tensor(float(sample.ids.shape[1]))}

    def validate(self) -> Mapping[str, float]:
        """Return divergence and exact match on held-out samples, overall and by kind."""
        by_kind: dict[str, list[Figures]] = {}
        for sample in self._validation_samples:
            for query, logits in self._answer(sample):
                by_kind.setdefault(query.kind, []).append(_compare(query, logits))
        overall = _average([figures for listed in by_kind.values() for figures in listed])
        exact = {f"exact_{kind}": float(_average(by_kind[kind])["exact"]) for kind in sorted(by_kind)}
        return {"kl": float(overall["kl"]), "exact": float(overall["exact"]), **exact}

    @cached_property
    def _validation_samples(self) -> list[Sample]:
        made = (
            self.maker.make_sample(("held", i), self.held_out, neighbours=i % 4 == 0) for i in range(self.validation)
        )
        return [sample.without_layers() for sample in made]

    def identity(self) -> Mapping[str, Any]:
        """Return the identity of model and data, the adapter's shape and the options."""
        config, sides = self.adapter.config, (self.sources, self.held_out)
        return {
            **identify_model(self.model),
            "rank": config.rank,
            "alpha": config.alpha,
            "modules": len(config.modules),
            "options": asdict(self.options),
            "documents": [derive_seed(*text) for side in sides for text in side.texts],
            "questions": [derive_seed(question.text) for side in sides for question in side.questions],
        }

    def _sample(self, number: int) -> Sample:
        """Return a training sample, from the pool if it is there."""
        if number not in self._pool:
            first = number - number % self.options.pool
            self._pool = {other: sample for other, sample in self._pool.items() if other >= first}
            neighbours = number < self.options.neighbours
            self._pool[number] = self.maker.make_sample(("train", number), self.sources, neighbours=neighbours)
        return self._pool[number]

    def _answer(self, sample: Sample) -> list[tuple[TokenizedQuery, Logits]]:
        """Return each query with the edited cache's logits after its input tokens; all queries share one edit."""
        layers = sample.layers
        if layers is None:
            layers = differentiable_cache.read(self.model, sample.ids)
        edited = differentiable_cache.steer(self.model, self.adapter, sample.ids, layers, sample.spans)
        return [
            (query, differentiable_cache.compute_logits(self.model, edited, query.input_ids, query.input_ids.shape[1]))
            for query in sample.queries
        ]


@dataclass(frozen=True, kw_only=True)
class EraserTraining(Training):
    """Options of ``vestige train eraser``, beside those of every training.

    Args:
        qa: JSONL files and hub data sets of questions, as :func:`~.questions.read_questions` takes them; may be empty.
        options: Options of samples and loss.
        rank: Rank of the adapter.
        begin: Folder of an adapter to start from; None starts with an adapter that changes nothing.

    Raises:
        InputError: As :class:`~vestige.training.trainer.Training`; or the rank is out of range.
    """

    weights: ClassVar[str] = "adapter"
    qa: tuple[str, ...] = ()
    options: EraserOptions
    rank: int = 16
    begin: Path | None = None
    validation: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise InputError("rank must be at least 1")

    def make_task(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts, held_out: Texts
    ) -> Made:
        questions = split_questions(read_questions(self.qa), share=HELD_OUT)
        sources = Sources(texts=texts, questions=questions[0])
        unseen = Sources(texts=held_out, questions=questions[1])
        if self.begin is None:
            adapter = Adapter.initialize(model, rank=self.rank, alpha=2.0 * self.rank)
        else:
            adapter = Adapter.load(self.begin, model)
        card = {
            "what": "KVEraser's LoRA version (arXiv 2606.17034): erases a span by replacing its keys and values",
            "qa": [Path(source).name for source in self.qa],
            "options": asdict(self.options),
            "rank": adapter.config.rank,
        }
        task = EraserTask(model, tokenizer, adapter, sources, unseen, self.options, validation=self.validation)
        return task, [adapter], card


def _compare(query: TokenizedQuery, logits: Logits) -> Figures:
    """Return figures that compare logits with those over the clean text."""
    count = len(query.target)
    reply, clean = logits[-count:], query.clean.float()
    nll = cross_entropy(reply, query.target)
    return {
        "nll": nll,
        "kl": _divergence(reply, clean[-count:]),
        "question_kl": _divergence(logits[:-count], clean[:-count]) if len(logits) > count else nll.new_zeros(()),
        "exact": (reply.argmax(-1) == query.target).all().float(),
    }


def _divergence(logits: Logits, clean: Logits) -> Float[Tensor, ""]:
    return kl_div(logits.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="batchmean")


def _average(figures: Sequence[Figures]) -> Figures:
    return {name: torch.stack([each[name] for each in figures]).mean() for name in figures[0]}
