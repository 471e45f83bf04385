"""From drafts to samples: what the model itself says of the clean text, and whether the passage led it astray.

Source: KVEraser, arXiv 2606.17034: the target is the model's own reply to the clean text, and a sample is kept only if
that is right and the reply to the whole text is not. Differs: samples are made as they are needed, each from its own
seed, and drafts are tried until one is worth training on; several queries share a text, because reading it costs most;
stage 1 quotes behind an anchor only.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige import locate
from vestige.errors import InputError
from vestige.learn.documents import Document
from vestige.learn.erasing import steering
from vestige.learn.erasing.drafts import Draft, Query
from vestige.learn.erasing.facts import facts
from vestige.learn.erasing.questions import Question, distracted
from vestige.learn.erasing.quotations import FEWEST, altered, neighbour, sentences
from vestige.learn.order import seed_of
from vestige.spans import Span, within
from vestige.text import Frame

SHORTEST = 12
"""Sentences that a text must have."""
_QUOTED_WORDS = 4
"""Words that a quotation must get right."""
_MIX = {"facts": 0.6, "altered": 0.25, "neighbour": 0.15, "question": 0.4}
"""Of the second stage; questions only if there are any."""


@dataclass(frozen=True, kw_only=True)
class EraserOptions:
    """What samples look like, and the loss.

    Raises:
        InputError: A number out of range.
    """

    neighbours: int = 600
    """Samples of stage 1, all quotations across a hole; later there are all kinds."""
    least: int = 300
    """Shortest text, in tokens, about."""
    most: int = 2000
    """Longest text, in tokens, about; lengths between are drawn evenly by their logarithm."""
    reply: int = 12
    """Longest reply, in tokens; a right one is known, and cut, when the answer is told."""
    kl: float = 0.0
    """Weight of the divergence from the clean text's logits."""
    tries: int = 8
    """Drafts that are looked at for one sample; if none will do, the first is taken as it is."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 100 <= self.least <= self.most:
            raise InputError(f"least and most must be tokens, at least 100, got {self.least} and {self.most}")
        if self.reply < 1 or self.tries < 1 or self.neighbours < 0 or self.kl < 0:
            raise InputError("reply and tries must be at least 1, neighbours and kl not negative")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A query in tokens, with the model's reply to the clean text.

    Args:
        kind: Of the query.
        question: Behind the text.
        target: The reply.
        clean: The logits of the target's tokens over the clean text.
        fooled: Whether the whole text gives another reply, as far as the query looks at that.
        right: Whether the reply is what the query wants.
    """

    kind: str
    question: Int[Tensor, "1 question"]
    target: Int[Tensor, " target"]
    clean: Float[Tensor, "target vocab"]
    fooled: bool
    right: bool

    @property
    def fed(self) -> Int[Tensor, "1 fed"]:
        """The question, and the target but for its last token."""
        return torch.cat([self.question, self.target[None, :-1]], 1)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text, what is erased of it, and what must be said afterwards.

    Args:
        ids: The text.
        spans: What is erased.
        asked: The main query first.
        layers: What reading the ids gives; None if that was let go.
    """

    ids: Int[Tensor, "1 seen"]
    spans: tuple[Span, ...]
    asked: tuple[Asked, ...]
    layers: Sequence[steering.Layer] | None

    def light(self) -> "Sample":
        """Return the sample without its keys and values, to be kept for long."""
        return replace(self, layers=None)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What samples are made of: sentences of prose by document, and questions about paragraphs, if there are any."""

    prose: Sequence[Sequence[str]]
    questions: Sequence[Question] = ()


class SampleMaker:
    """Makes samples of drafts, by asking the model what it says with and without the passages."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: EraserOptions) -> None:
        self.model, self.tokenizer, self.frame, self.options = model, tokenizer, Frame(tokenizer), options
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.stop = tuple(ends) if isinstance(ends, list) else () if ends is None else (int(ends),)

    @torch.no_grad()
    def sample(self, name: tuple[str | int, ...], texts: Texts, *, neighbours: bool) -> Sample:
        """Return the first of some drafts that is worth training on.

        Args:
            name: What everything that is drawn follows from.
            texts: What it is made of.
            neighbours: Of the first stage, or of all kinds.

        Raises:
            InputError: No draft gave a reply at all.
        """
        draw = random.Random(seed_of(self.options.seed, *name))
        mix = {form: weight for form, weight in _MIX.items() if form != "question" or texts.questions}
        form = "neighbour" if neighbours else draw.choices(list(mix), list(mix.values()))[0]
        first: Draft | None = None
        for attempt in range(self.options.tries):
            draft = self._draft(random.Random(seed_of(self.options.seed, *name, attempt)), texts, form)
            first = first or draft
            if made := self._worth(draft):
                return made
        assert first is not None
        layers, _ = steering.read(self.model, ids := self._ids(first))
        if made := self._asked(first, ids, layers):
            return made
        raise InputError(f"the model says nothing to {first.queries[0].question!r}: is it a model that answers?")

    def _draft(self, rng: random.Random, texts: Texts, form: str) -> Draft:
        length = round(self.options.least * (self.options.most / self.options.least) ** rng.random())
        text, other = rng.choice(texts.prose), rng.choice(texts.prose)
        chosen = list(self._cut(rng, text, length))
        made: Draft | None = None
        if form == "facts":
            made = facts(rng, chosen)
        elif form == "altered":
            made = altered(rng, chosen, other)
        elif form == "question":
            made = distracted(rng, texts.questions, sum(map(len, chosen)))
        return made or neighbour(rng, chosen, other)

    def _cut(self, rng: random.Random, text: Sequence[str], length: int) -> Iterator[str]:
        """Yield sentences from a random one on, going round, of so many tokens in all, about."""
        at, count, said = rng.randrange(len(text)), 0, 0
        while count < length or said < FEWEST + 2:
            yield text[at]
            count += len(self.tokenizer(text[at], add_special_tokens=False)["input_ids"])
            at, said = (at + 1) % len(text), said + 1

    def _worth(self, draft: Draft) -> Sample | None:
        """Return a draft, or its flipped one if the model believes what stays, as a sample; None if neither teaches."""
        layers, _ = steering.read(self.model, ids := self._ids(draft))
        for one in filter(None, (draft, draft.flipped())):
            main = one.queries[0]
            if main.misled and main.answer and self._right(main, self._said(main, layers)[0]):
                continue  # known without reading the clean text
            made = self._asked(one, ids, layers)
            if made and made.asked[0].right and (made.asked[0].fooled or not main.misled):
                return made
        return None

    def _asked(self, draft: Draft, ids: Int[Tensor, "1 seen"], layers: Sequence[steering.Layer]) -> Sample | None:
        """Return a draft with the model's replies to the clean text; None if it says nothing to the main query."""
        offsets = self.frame.offsets(draft.text)
        spans = tuple(locate.tokens_at(draft.text, start, end, offsets) for start, end in draft.spans)
        first = spans[0].start
        rest = ids[:, ~within(torch.arange(ids.shape[1], device=ids.device), spans)][:, first:]
        before = [(keys[:, :, :first], values[:, :, :first]) for keys, values in layers]
        clean = steering.read(self.model, rest, before)[0] if rest.shape[1] else before
        main, *others = draft.queries
        asked = [self._reply(main, clean, layers), *(self._taken_along(query, clean, layers) for query in others)]
        found = tuple(one for one in asked if one is not None)
        return Sample(ids=ids, spans=spans, asked=found, layers=layers) if asked[0] else None

    def _taken_along(
        self, query: Query, clean: Sequence[steering.Layer], dirty: Sequence[steering.Layer]
    ) -> Asked | None:
        """Return a query that the model answers right without being asked for more than one forward."""
        said, logits = self._said(query, clean)
        return self._compared(query, said, logits, dirty) if self._right(query, said) else None

    def _reply(self, query: Query, clean: Sequence[steering.Layer], dirty: Sequence[steering.Layer]) -> Asked | None:
        """Return a query with the reply to the clean text, whatever it is; None if there is none."""
        if query.answer:
            said, logits = self._said(query, clean)
            if self._right(query, said):
                return self._compared(query, said, logits, dirty)
        question = self._question(query)
        said = steering.reply(self.model, clean, question, self.options.reply, self.stop)
        if not said:
            return None
        fed = torch.cat([question, question.new_tensor([said[:-1]])], 1)
        return self._compared(query, said, steering.logits_over(self.model, clean, fed, len(said)), dirty)

    def _said(self, query: Query, layers: Sequence[steering.Layer]) -> tuple[list[int], Float[Tensor, "said vocab"]]:
        """Return how far the greedy reply follows the answer, and its next token, with their logits, by one forward."""
        wanted: Any = self.tokenizer(f" {query.answer}".rstrip(), add_special_tokens=False)
        guess = wanted["input_ids"][: self.options.reply - 1]
        fed = torch.cat([question := self._question(query), question.new_tensor([guess])], 1)
        logits = steering.logits_over(self.model, layers, fed, len(guess) + 1)
        said: list[int] = []
        for token, expected in zip(logits.argmax(-1).tolist(), [*guess, None], strict=True):
            if token in self.stop:
                break
            said.append(token)
            if token != expected:
                break
        return said, logits[: len(said)]

    def _compared(
        self, query: Query, said: list[int], logits: Float[Tensor, "said vocab"], dirty: Sequence[steering.Layer]
    ) -> Asked:
        """Return a query with a reply to the clean text, compared with what the whole text gives."""
        question = self._question(query)
        target = torch.tensor(said, device=question.device)
        asked = Asked(
            kind=query.kind,
            question=question,
            target=target,
            clean=logits,
            fooled=False,
            right=self._right(query, said),
        )
        if not query.misled:
            return asked
        told = steering.logits_over(self.model, dirty, asked.fed, len(said)).argmax(-1)
        return replace(asked, fooled=bool((told != target).any()))

    def _ids(self, draft: Draft) -> Int[Tensor, "1 seen"]:
        return self.frame.context(draft.text).to(self.model.device)

    def _question(self, query: Query) -> Int[Tensor, "1 question"]:
        return self.frame.question(query.question, query.prefix).to(self.model.device)

    def _right(self, query: Query, said: list[int]) -> bool:
        """Return whether a reply to the clean text has the answer, or begins with the quotation."""
        text = str(self.tokenizer.decode(said))
        if query.verbatim:
            return text.split()[:_QUOTED_WORDS] == query.answer.split()[:_QUOTED_WORDS]
        return query.answer.lower() in text.lower()


def prose_of(documents: Sequence[Document]) -> list[list[str]]:
    """Return the sentences of every document that has enough of them.

    Raises:
        InputError: None has.
    """
    found = [sentences(document.text) for document in documents]
    long = [text for text in found if len(text) >= SHORTEST]
    if not long:
        raise InputError(f"no text to train or validate on has {SHORTEST} sentences or more")
    return long
