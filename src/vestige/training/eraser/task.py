"""The task that trains the learned eraser to give the clean text's replies through the erased passages' own pairs.

Source: KVEraser, arXiv 2606.17034: the loss is the negative log-likelihood of the reply over the surrogate cache, which
is an option here. Differs: the loss is the divergence from the model's distribution over the clean text, on question
and reply, because the likelihood makes replies surer than the model's own (lab notes of 2026-11-23). Several queries
share an edit, as in use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.nn.lora import Adapter
from vestige.training.eraser import differentiable_cache
from vestige.training.eraser.samples import EraserOptions, Sample, SampleMaker, Sources, TokenizedQuery
from vestige.training.sampler import derive_seed
from vestige.training.task import identify_model

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
        self.model, self.adapter, self.options = model.requires_grad_(False).eval(), adapter, options
        self.maker = SampleMaker(model, tokenizer, options)
        self.sources, self.held_out, self.validation = sources, held_out, validation
        self._pool: dict[int, Sample] = {}
        self._validation_samples: list[Sample] = []

    @property
    def module(self) -> nn.Module:
        """The adapter."""
        return self.adapter

    @property
    def num_samples(self) -> None:
        """None: the samples are an endless stream."""
        return None

    def loss(self, index: int) -> Mapping[str, Tensor]:
        """Return the loss of a sample over the surrogate cache, averaged over its queries."""
        sample, options = self._sample(self.options.sample_number(index)), self.options
        figures = _average([_compare(query, logits) for query, logits in self._answer(sample)])
        weights = {"nll": options.nll, "kl": options.kl, "question_kl": options.question_kl}
        loss = torch.stack([weight * figures[name] for name, weight in weights.items()]).sum()
        return {"loss": loss, **figures, "tokens": loss.new_tensor(float(sample.ids.shape[1]))}

    def validate(self) -> Mapping[str, float]:
        """Return divergence and exact match on held-out samples, overall and by kind."""
        if not self._validation_samples:
            self._validation_samples = [
                self.maker.make_sample(("held", i), self.held_out, neighbours=i % 4 == 0).without_layers()
                for i in range(self.validation)
            ]
        by_kind: dict[str, list[Figures]] = {}
        for sample in self._validation_samples:
            for query, logits in self._answer(sample):
                by_kind.setdefault(query.kind, []).append(_compare(query, logits))
        overall = _average([figures for listed in by_kind.values() for figures in listed])
        exact = {f"exact_{kind}": float(_average(by_kind[kind])["exact"]) for kind in sorted(by_kind)}
        return {"kl": float(overall["kl"]), "exact": float(overall["exact"]), **exact}

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
