"""The learned eraser as something to train: the reply to the clean text, taught through the passage's own pairs.

Source: KVEraser, arXiv 2606.17034: the loss is the negative log-likelihood of the reply over the surrogate cache.
Differs: several queries share an edit, as they will in use; a KL term is an option.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.adapter import Adapter
from vestige.learn.erasing import steering
from vestige.learn.erasing.samples import Asked, EraserOptions, Sample, SampleMaker, Texts
from vestige.learn.order import seed_of
from vestige.models import check

Logits = Float[Tensor, "target vocab"]


class EraserTask:
    """The learned eraser as a :class:`vestige.learn.Task`: a stream of samples, each a function of its index alone.

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
        sample = self._sample(self.options.taken(index))
        answered = self._answered(sample)
        nll = torch.stack([cross_entropy(logits, one.target) for one, logits in answered]).mean()
        exact = torch.stack([_exact(one, logits) for one, logits in answered]).mean()
        parts = {"loss": nll, "exact": exact, "tokens": nll.new_tensor(float(sample.ids.shape[1]))}
        if self.options.kl:
            parts["kl"] = torch.stack([_divergence(one, logits) for one, logits in answered]).mean()
            parts["loss"] = nll + self.options.kl * parts["kl"]
        return parts

    def validate(self) -> Mapping[str, float]:
        """Return loss and exact match on texts and statements that are not trained on, in all and by kind."""
        if not self._to_validate:
            self._to_validate = [
                self.maker.sample(("held", i), self.held, neighbours=i % 4 == 0).light() for i in range(self.validation)
            ]
        losses, exact = [], dict[str, list[float]]()
        for sample in self._to_validate:
            for one, logits in self._answered(sample):
                losses.append(float(cross_entropy(logits, one.target)))
                exact.setdefault(one.kind, []).append(float(_exact(one, logits)))
        every = [one for kind in exact.values() for one in kind]
        by_kind = {f"exact_{kind}": sum(found) / len(found) for kind, found in sorted(exact.items())}
        return {"loss": sum(losses) / len(losses), "exact": sum(every) / len(every), **by_kind}

    def identity(self) -> Mapping[str, Any]:
        """Return the model, the adapter's shape, the options and the data."""
        config = self.adapter.config
        return {
            "model": check(self.model).fingerprint(),
            "rank": config.rank,
            "alpha": config.alpha,
            "modules": len(config.modules),
            "options": asdict(self.options),
            "documents": [seed_of(*text[:3]) for text in (*self.texts.prose, *self.held.prose)],
            "questions": [seed_of(one.text) for one in (*self.texts.questions, *self.held.questions)],
        }

    def _sample(self, number: int) -> Sample:
        """Return a sample to train on, from the pool if it is there."""
        if number not in self._pool:
            first = number - number % self.options.pool
            self._pool = {one: sample for one, sample in self._pool.items() if one >= first}
            neighbours = number < self.options.neighbours
            self._pool[number] = self.maker.sample(("train", number), self.texts, neighbours=neighbours)
        return self._pool[number]

    def _answered(self, sample: Sample) -> list[tuple[Asked, Logits]]:
        """Return what the edited cache says to each query, as logits of the target's tokens; one edit serves all."""
        layers = sample.layers
        if layers is None:
            layers, _ = steering.read(self.model, sample.ids)
        steered = steering.steer(self.model, self.adapter, sample.ids, layers, sample.spans)
        return [(one, steering.logits_over(self.model, steered, one.fed, len(one.target))) for one in sample.asked]


def _exact(asked: Asked, logits: Logits) -> Float[Tensor, ""]:
    return (logits.argmax(-1) == asked.target).all().float()


def _divergence(asked: Asked, logits: Logits) -> Float[Tensor, ""]:
    own, clean = logits.log_softmax(-1), asked.clean.log_softmax(-1)
    return kl_div(own, clean, log_target=True, reduction="batchmean")
