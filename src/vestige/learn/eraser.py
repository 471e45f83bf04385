"""Training the learned eraser: the reply to a text without a passage, taught through the passage's own pairs.

Source: KVEraser, arXiv 2606.17034: the target is what the model itself says of the clean text, the loss its negative
log-likelihood over the surrogate cache. Differs: samples are made up as they are needed, each from its own seed, and
asked of the model until one is worth training on; stage 1 quotes behind an anchor only; a KL term is an option.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige import locate
from vestige.adapter import Adapter
from vestige.errors import InputError
from vestige.learn import erasing_texts, steering
from vestige.learn.documents import Document
from vestige.learn.erasing_texts import Draft
from vestige.learn.order import seed_of
from vestige.models import check
from vestige.spans import Span, within
from vestige.text import Frame

_SHORTEST = 12
"""Sentences that a text must have."""
_QUOTED_WORDS = 4
"""Words that a quotation must get right."""


@dataclass(frozen=True, kw_only=True)
class EraserOptions:
    """What samples look like, and the loss.

    Raises:
        InputError: A number out of range.
    """

    neighbours: int = 600
    """Samples of stage 1; then one in five."""
    least: int = 300
    """Shortest text, in tokens, about."""
    most: int = 1400
    """Longest text, in tokens, about; lengths between are drawn evenly by their logarithm."""
    reply: int = 16
    """Longest reply, in tokens."""
    kl: float = 0.0
    """Weight of the divergence from the clean text's logits."""
    tries: int = 8
    """Drafts that are looked at for one sample; the last is taken as it is, if its reply can be used at all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 100 <= self.least <= self.most:
            raise InputError(f"least and most must be tokens, at least 100, got {self.least} and {self.most}")
        if self.reply < 1 or self.tries < 1 or self.neighbours < 0 or self.kl < 0:
            raise InputError("reply and tries must be at least 1, neighbours and kl not negative")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Something to erase and what must be said afterwards, in tokens.

    Args:
        kind: Of the draft.
        ids: The text.
        spans: What is erased.
        question: Behind the text.
        target: The model's reply to the clean text.
        clean: The logits of the target's tokens there.
        fooled: Whether the text with the passage gives another reply.
    """

    kind: str
    ids: Int[Tensor, "1 seen"]
    spans: tuple[Span, ...]
    question: Int[Tensor, "1 question"]
    target: Int[Tensor, " target"]
    clean: Float[Tensor, "target vocab"]
    fooled: bool

    @property
    def fed(self) -> Int[Tensor, "1 fed"]:
        """The question, and the target but for its last token."""
        return torch.cat([self.question, self.target[None, :-1]], 1)


class EraserTask:
    """The learned eraser as a :class:`vestige.learn.Task`: a stream of samples, each a function of its index alone.

    Args:
        model: Frozen by this.
        tokenizer: The model's, a fast one.
        adapter: What is trained.
        documents: Prose to train on.
        held: Prose to validate on.
        options: Of samples and loss.
        validation: Samples to validate on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapter: Adapter,
        documents: Sequence[Document],
        held: Sequence[Document],
        options: EraserOptions,
        *,
        validation: int = 24,
    ) -> None:
        self.model, self.adapter, self.options = model.requires_grad_(False).eval(), adapter, options
        self.maker = SampleMaker(model, tokenizer, options)
        self.prose, self.held = _sentences(documents), _sentences(held)
        self.validation = validation
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
        """Return the loss of a sample over the surrogate cache."""
        sample = self.maker.sample(("train", index), self.prose, neighbours=self._first_stage(index))
        logits = self._steered(sample)
        nll = cross_entropy(logits, sample.target)
        right = (logits.argmax(-1) == sample.target).all().float()
        parts = {"loss": nll, "exact": right, "tokens": logits.new_tensor(float(sample.ids.shape[1]))}
        if self.options.kl:
            own, clean = logits.log_softmax(-1), sample.clean.log_softmax(-1)
            parts["kl"] = kl_div(own, clean, log_target=True, reduction="batchmean")
            parts["loss"] = nll + self.options.kl * parts["kl"]
        return parts

    def validate(self) -> Mapping[str, float]:
        """Return loss and exact match on texts and statements that are not trained on, in all and by kind."""
        if not self._to_validate:
            self._to_validate = [
                self.maker.sample(("held", i), self.held, neighbours=i % 4 == 0) for i in range(self.validation)
            ]
        losses, exact = [], dict[str, list[float]]()
        for sample in self._to_validate:
            logits = self._steered(sample)
            losses.append(float(cross_entropy(logits, sample.target)))
            exact.setdefault(sample.kind, []).append(float((logits.argmax(-1) == sample.target).all()))
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
            "documents": [seed_of(*text[:3]) for text in (*self.prose, *self.held)],
        }

    def _first_stage(self, index: int) -> bool:
        return index < self.options.neighbours or index % 5 == 0

    def _steered(self, sample: Sample) -> Float[Tensor, "target vocab"]:
        layers, _ = steering.read(self.model, sample.ids)
        steered = steering.steer(self.model, self.adapter, sample.ids, layers, sample.spans)
        return steering.logits_over(self.model, steered, sample.fed, len(sample.target))


class SampleMaker:
    """Makes samples of drafts, by asking the model what it says with and without the passages."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: EraserOptions) -> None:
        self.model, self.tokenizer, self.frame, self.options = model, tokenizer, Frame(tokenizer), options
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.stop = tuple(ends) if isinstance(ends, list) else () if ends is None else (int(ends),)

    def sample(self, name: tuple[str | int, ...], prose: Sequence[Sequence[str]], *, neighbours: bool) -> Sample:
        """Return the first of some drafts that is worth training on.

        Args:
            name: What everything that is drawn follows from.
            prose: Sentences of texts.
            neighbours: Of the first stage, or of facts.

        Raises:
            InputError: No draft gave a reply at all.
        """
        usable: Sample | None = None
        for attempt in range(self.options.tries):
            rng = random.Random(seed_of(self.options.seed, *name, attempt))
            first = self._draft(rng, prose, neighbours)
            for draft in filter(None, (first, first.flipped())):
                made, worth = self._asked(draft)
                if made is not None and worth:
                    return made
                usable = made or usable
                if made is None or made.fooled:
                    break  # the other way round helps only where the model believes what stays
        if usable is None:
            raise InputError(f"the model said nothing to {self.options.tries} questions: is it a model that answers?")
        return usable

    def _draft(self, rng: random.Random, prose: Sequence[Sequence[str]], neighbours: bool) -> Draft:
        length = round(self.options.least * (self.options.most / self.options.least) ** rng.random())
        text, other = rng.choice(prose), rng.choice(prose)
        chosen = list(self._cut(rng, text, length))
        if neighbours:
            return erasing_texts.neighbour(rng, chosen, other)
        return erasing_texts.facts(rng, chosen)

    def _cut(self, rng: random.Random, text: Sequence[str], length: int) -> Iterator[str]:
        """Yield sentences from a random one on, going round, of so many tokens in all, about."""
        at, count, said = rng.randrange(len(text)), 0, 0
        while count < length or said < _SHORTEST // 2 + 2:
            yield text[at]
            count += len(self.tokenizer(text[at], add_special_tokens=False)["input_ids"])
            at, said = (at + 1) % len(text), said + 1

    def _asked(self, draft: Draft) -> tuple[Sample | None, bool]:
        """Return a draft as a sample, and whether it is worth training on; None if the clean text gives no reply."""
        offsets = self.frame.offsets(draft.text)
        spans = tuple(locate.tokens_at(draft.text, start, end, offsets) for start, end in draft.spans)
        ids = self.frame.context(draft.text).to(self.model.device)
        question = self.frame.question(draft.question, draft.prefix).to(self.model.device)
        kept = ~within(torch.arange(ids.shape[1], device=ids.device), spans)
        clean, _ = steering.read(self.model, ids[:, kept])
        said = steering.reply(self.model, clean, question, self.options.reply, self.stop)
        if not said:
            return None, False
        target = torch.tensor(said, device=ids.device)
        fed = torch.cat([question, target[None, :-1]], 1)
        with torch.no_grad():
            logits = steering.logits_over(self.model, clean, fed, len(said))
            dirty, _ = steering.read(self.model, ids)
            fooled = bool((steering.logits_over(self.model, dirty, fed, len(said)).argmax(-1) != target).any())
        sample = Sample(
            kind=draft.kind, ids=ids, spans=spans, question=question, target=target, clean=logits, fooled=fooled
        )
        return sample, self._right(draft, said) and (fooled or not draft.misled)

    def _right(self, draft: Draft, said: list[int]) -> bool:
        """Return whether a reply to the clean text is right: it has the answer, or begins as the text goes on."""
        text = str(self.tokenizer.decode(said))
        if draft.kind in erasing_texts.QUOTED:
            return text.split()[:_QUOTED_WORDS] == draft.answer.split()[:_QUOTED_WORDS]
        return draft.answer.lower() in text.lower()


def _sentences(documents: Sequence[Document]) -> list[list[str]]:
    found = [erasing_texts.sentences(document.text) for document in documents]
    long = [text for text in found if len(text) >= _SHORTEST]
    if not long:
        raise InputError(f"no text to train or validate on has {_SHORTEST} sentences or more")
    return long
