"""The learned eraser as something to train: the reply to the clean text, taught through the passage's own pairs.

Source: KVEraser, arXiv 2606.17034: the loss is the negative log-likelihood of the reply over the surrogate cache, which
is an option here. Differs: the loss is the divergence from what the model says of the clean text, over question and
reply, since the other makes it surer than it is (LOG.md); several queries share an edit, as they will in use.
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
from vestige.training.eraser.samples import EraserOptions, Sample, SampleMaker, Texts, TokenizedQuery
from vestige.training.sampler import derive_seed
from vestige.training.task import model_identity

Logits = Float[Tensor, "fed vocab"]
Figures = dict[str, Float[Tensor, ""]]
"""Of a query: the reply's NLL, its divergence from the clean one, that of the question, and exact match."""


class EraserTask:
    """A task that trains the learned eraser: a stream of samples, each a function of its index alone.

    Args:
        model: Frozen by this.
        tokenizer: The model's, a fast one.
        adapter: What is trained.
        texts: To train on.
        held: To validate on.
        options: Of samples and loss.
        validation: Samples to validate on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapter: Adapter,
        texts: Texts,
        held: Texts,
        options: EraserOptions,
        *,
        validation: int = 24,
    ) -> None:
        self.model, self.adapter, self.options = model.requires_grad_(False).eval(), adapter, options
        self.maker = SampleMaker(model, tokenizer, options)
        self.texts, self.held = texts, held
        self.validation = validation
        self._pool: dict[int, Sample] = {}
        self._to_validate: list[Sample] = []

    @property
    def module(self) -> nn.Module:
        """The adapter."""
        return self.adapter

    @property
    def num_samples(self) -> None:
        """Samples come in a stream."""
        return None

    def loss(self, index: int) -> Mapping[str, Tensor]:
        """Return the loss of a sample over the surrogate cache, the mean over its queries."""
        sample, options = self._sample(self.options.sample_number(index)), self.options
        figures = _means([_compared(*one) for one in self._answer(sample)])
        weights = {"nll": options.nll, "kl": options.kl, "question_kl": options.question_kl}
        loss = torch.stack([weight * figures[name] for name, weight in weights.items()]).sum()
        return {"loss": loss, **figures, "tokens": loss.new_tensor(float(sample.ids.shape[1]))}

    def validate(self) -> Mapping[str, float]:
        """Return divergence and exact match on texts and statements that are not trained on, in all and by kind."""
        if not self._to_validate:
            self._to_validate = [
                self.maker.make_sample(("held", i), self.held, neighbours=i % 4 == 0).without_layers()
                for i in range(self.validation)
            ]
        by_kind: dict[str, list[Figures]] = {}
        for sample in self._to_validate:
            for asked, logits in self._answer(sample):
                by_kind.setdefault(asked.kind, []).append(_compared(asked, logits))
        overall = _means([one for some in by_kind.values() for one in some])
        exact = {f"exact_{kind}": float(_means(by_kind[kind])["exact"]) for kind in sorted(by_kind)}
        return {"kl": float(overall["kl"]), "exact": float(overall["exact"]), **exact}

    def identity(self) -> Mapping[str, Any]:
        """Return the model, the adapter's shape, the options and the data."""
        config = self.adapter.config
        return {
            **model_identity(self.model),
            "rank": config.rank,
            "alpha": config.alpha,
            "modules": len(config.modules),
            "options": asdict(self.options),
            "documents": [derive_seed(*text) for text in (*self.texts.prose, *self.held.prose)],
            "questions": [derive_seed(one.text) for one in (*self.texts.questions, *self.held.questions)],
        }

    def _sample(self, number: int) -> Sample:
        """Return a sample to train on, from the pool if it is there."""
        if number not in self._pool:
            first = number - number % self.options.pool
            self._pool = {one: sample for one, sample in self._pool.items() if one >= first}
            neighbours = number < self.options.neighbours
            self._pool[number] = self.maker.make_sample(("train", number), self.texts, neighbours=neighbours)
        return self._pool[number]

    def _answer(self, sample: Sample) -> list[tuple[TokenizedQuery, Logits]]:
        """Return what the edited cache says to each query, as logits behind all that is fed; one edit serves all."""
        layers = sample.layers
        if layers is None:
            layers = differentiable_cache.read(self.model, sample.ids)
        steered = differentiable_cache.steer(self.model, self.adapter, sample.ids, layers, sample.spans)
        return [
            (one, differentiable_cache.compute_logits(self.model, steered, one.input_ids, one.input_ids.shape[1]))
            for one in sample.asked
        ]


def _compared(asked: TokenizedQuery, logits: Logits) -> Figures:
    """Return how logits compare with those over the clean text."""
    count = len(asked.target)
    reply, clean = logits[-count:], asked.clean.float()
    nll = cross_entropy(reply, asked.target)
    return {
        "nll": nll,
        "kl": _divergence(reply, clean[-count:]),
        "question_kl": _divergence(logits[:-count], clean[:-count]) if len(logits) > count else nll.new_zeros(()),
        "exact": (reply.argmax(-1) == asked.target).all().float(),
    }


def _divergence(logits: Logits, clean: Logits) -> Float[Tensor, ""]:
    return kl_div(logits.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="batchmean")


def _means(all_figures: Sequence[Figures]) -> Figures:
    return {name: torch.stack([one[name] for one in all_figures]).mean() for name in all_figures[0]}
