"""From drafts to samples: what the model itself says of the clean text, and whether the passage led it astray.

Source: KVEraser, arXiv 2606.17034: the target is the model's own reply to the clean text, and a sample is kept only if
that is right and the reply to the whole text is not. Differs: samples are made as they are needed, each from its own
seed, and drafts are tried until one is worth training on; several queries share a text, because reading it costs most;
stage 1 quotes behind an anchor only; as an option the reply need not be right.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.spans import Span, within
from vestige.text import locate
from vestige.text.chat_template import Frame, ends_of
from vestige.training.data.sentences import draw_sentences
from vestige.training.eraser import differentiable_cache
from vestige.training.eraser.facts import draft_facts
from vestige.training.eraser.questions import Question, draft_distractor
from vestige.training.eraser.quotations import FEWEST, draft_altered, draft_neighbour
from vestige.training.eraser.templates import Draft, Query
from vestige.training.sampler import derive_seed

_QUOTED_WORDS = 4
"""Words that a quotation must get right."""
_MIX = {"facts": 0.65, "altered": 0.25, "neighbour": 0.1, "question": 0.4}
"""Of the second stage; questions only if there are any. Where a text allows none of a kind, it gets facts."""


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
    """Longest reply, in tokens; longer ones are cut."""
    free_reply: int = 24
    """Longest reply that nothing opens, where the answer comes late."""
    right: bool = True
    """Whether the reply to the clean text must be right, as in the paper; else it is enough that the passage changes
    it, and the reply is learned as it is."""
    nll: float = 0.0
    """Weight of the reply to the clean text as the one right answer: surer than the model itself is."""
    kl: float = 1.0
    """Weight of the divergence from the clean text's logits, over the reply."""
    question_kl: float = 0.25
    """Weight of the same over the question."""
    tries: int = 8
    """Drafts that are looked at for one sample; if none will do, the first is taken as it is."""
    passes: int = 1
    """How often each sample is trained on: making one costs several times as much."""
    pool: int = 64
    """Samples that are gone over in turn so often, then the next; their texts' keys and values are in memory."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 100 <= self.least <= self.most:
            raise InputError(f"least and most must be tokens, 100 <= least <= most, got {self.least} and {self.most}")
        if min(self.reply, self.free_reply) < 1 or self.tries < 1 or self.neighbours < 0:
            raise InputError("reply, free_reply and tries must be at least 1, neighbours not negative")
        weights = self.nll, self.kl, self.question_kl
        if min(weights) < 0 or not any(weights):
            raise InputError(f"nll, kl and question_kl must not be negative, nor all 0, got {weights}")
        if self.passes < 1 or self.pool < 1:
            raise InputError("passes and pool must be at least 1")

    def sample_number(self, index: int) -> int:
        """Return which sample of the stream is trained on at an index."""
        block, place = divmod(index, self.pool * self.passes)
        return block * self.pool + place % self.pool


@dataclass(frozen=True, kw_only=True)
class TokenizedQuery:
    """A query in tokens, with the model's reply to the clean text.

    Args:
        kind: Of the query.
        question: Behind the text.
        target: The reply, with what ends it unless it is cut: when to stop is part of it.
        clean: The logits behind all that is fed, over the clean text, in the model's dtype.
        fooled: Whether the whole text gives another reply, as far as the query looks at that.
        right: Whether the reply is what the query wants.
    """

    kind: str
    question: Int[Tensor, "1 question"]
    target: Int[Tensor, " target"]
    clean: Float[Tensor, "fed vocab"]
    fooled: bool
    right: bool

    @property
    def input_ids(self) -> Int[Tensor, "1 fed"]:
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
    asked: tuple[TokenizedQuery, ...]
    layers: Sequence[differentiable_cache.Layer] | None

    def without_layers(self) -> "Sample":
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
        self.stop = ends_of(model, tokenizer)

    @torch.no_grad()
    def make_sample(self, name: tuple[str | int, ...], texts: Texts, *, neighbours: bool) -> Sample:
        """Return the first of some drafts that is worth training on.

        Args:
            name: What everything that is drawn follows from.
            texts: What it is made of.
            neighbours: Of the first stage, or of all kinds.

        Raises:
            InputError: No draft gave a reply at all.
        """
        draw = random.Random(derive_seed(self.options.seed, *name))
        mix = {form: weight for form, weight in _MIX.items() if form != "question" or texts.questions}
        form = "neighbour" if neighbours else draw.choices(list(mix), list(mix.values()))[0]
        drafts: list[Draft] = []
        for attempt in range(self.options.tries):
            drafts.append(self._draft(random.Random(derive_seed(self.options.seed, *name, attempt)), texts, form))
            if made := self._find_worthwhile(drafts[-1]):
                return made
        return self._whatever(drafts)

    def _whatever(self, drafts: Sequence[Draft]) -> Sample:
        """Return the first draft to which the model says anything, as a sample.

        Raises:
            InputError: It says nothing to any of them.
        """
        for draft in drafts:
            layers = differentiable_cache.read(self.model, ids := self._ids(draft))
            if made := self._asked(draft, ids, layers, worth=False):
                return made
        question = drafts[0].queries[0].question
        raise InputError(f"the model says nothing to {question!r} and the like: is it a model that answers?")

    def _draft(self, rng: random.Random, texts: Texts, form: str) -> Draft:
        length = round(self.options.least * (self.options.most / self.options.least) ** rng.random())
        text, other = rng.choice(texts.prose), rng.choice(texts.prose)
        chosen = draw_sentences(rng, text, length, self._tokens, fewest=FEWEST + 2)
        made: Draft | None = None
        if form == "neighbour":
            made = draft_neighbour(rng, chosen, other)
        elif form == "altered":
            made = draft_altered(rng, chosen, other)
        elif form == "question":
            made = draft_distractor(rng, texts.questions, sum(map(len, chosen)))
        return made or draft_facts(rng, chosen)

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _find_worthwhile(self, draft: Draft) -> Sample | None:
        """Return a draft, or its flipped one if the model believes what stays, as a sample; None if neither teaches."""
        layers = differentiable_cache.read(self.model, ids := self._ids(draft))
        for one in filter(None, (draft, draft.flipped())):
            main = one.queries[0]
            if main.misled and main.answer and self._is_right(main, self._greedy_answer(main, layers)):
                continue  # known without reading the clean text
            if made := self._asked(one, ids, layers, worth=True):
                return made
        return None

    def _asked(
        self, draft: Draft, ids: Int[Tensor, "1 seen"], layers: Sequence[differentiable_cache.Layer], *, worth: bool
    ) -> Sample | None:
        """Return a draft with the model's replies to the clean text.

        Args:
            draft: With one of its statements to go.
            ids: Its text.
            layers: What reading them gave.
            worth: Whether it must be worth training on.

        Returns:
            None if the model says nothing to the main query, or it is not worth it.
        """
        offsets = self.frame.offsets(draft.text)
        spans = tuple(locate.tokens_at(draft.text, start, end, offsets) for start, end in draft.spans)
        first = spans[0].start
        rest = ids[:, ~within(torch.arange(ids.shape[1], device=ids.device), spans)][:, first:]
        before = [(keys[:, :, :first], values[:, :, :first]) for keys, values in layers]
        clean = differentiable_cache.read(self.model, rest, before) if rest.shape[1] else before
        query, *others = draft.queries
        said = self._greedy_answer(query, clean) if query.answer else []
        if query.answer and not self._is_right(query, said):
            if worth and self.options.right:
                return None  # before anything else is asked
            said = []
        main = self._compared(query, said, clean, layers)
        if main is None or (worth and not self._is_worthwhile(query, main)):
            return None
        along = (self._taken_along(one, clean, layers) for one in others)
        return Sample(ids=ids, spans=spans, asked=(main, *filter(None, along)), layers=layers)

    def _is_worthwhile(self, query: Query, asked: TokenizedQuery) -> bool:
        """Return whether what the model says to the main query makes the text worth training on."""
        return (asked.right or not self.options.right) and (asked.fooled or not query.misled)

    def _taken_along(
        self, query: Query, clean: Sequence[differentiable_cache.Layer], dirty: Sequence[differentiable_cache.Layer]
    ) -> TokenizedQuery | None:
        """Return a query that the model answers right, without more than one forward if the reply is opened."""
        if not query.prefix:
            made = self._compared(query, [], clean, dirty)
            return made if made and (made.right or not self.options.right) else None
        said = self._greedy_answer(query, clean)
        return self._compared(query, said, clean, dirty) if self._is_right(query, said) else None

    def _greedy_answer(self, query: Query, layers: Sequence[differentiable_cache.Layer]) -> list[int]:
        """Return how far the greedy reply follows the answer, and its next token, by one forward."""
        wanted: Any = self.tokenizer(f" {query.answer}".rstrip(), add_special_tokens=False)
        guess = wanted["input_ids"][: self.options.reply - 1]
        fed = torch.cat([question := self._question(query), question.new_tensor([guess])], 1)
        logits = differentiable_cache.compute_logits(self.model, layers, fed, len(guess) + 1)
        said = list[int]()
        for token, expected in zip(logits.argmax(-1).tolist(), [*guess, None], strict=True):
            if token in self.stop:
                break
            said.append(token)
            if token != expected:
                break
        return said

    def _compared(
        self,
        query: Query,
        said: list[int],
        clean: Sequence[differentiable_cache.Layer],
        dirty: Sequence[differentiable_cache.Layer],
    ) -> TokenizedQuery | None:
        """Return a query with the whole reply to the clean text, compared with what the dirty one gives.

        Args:
            query: What is asked.
            said: How the reply begins, as far as that is known.
            clean: Without the passages.
            dirty: With them.

        Returns:
            None if there is no reply.
        """
        question = self._question(query)
        begun = torch.cat([question, question.new_tensor([said])], 1) if said else question
        limit = self.options.reply if query.prefix else self.options.free_reply
        said = [*said, *differentiable_cache.greedy_reply(self.model, clean, begun, limit - len(said), self.stop)]
        if said[0] in self.stop:
            return None
        target = torch.tensor(said, device=question.device)
        fed = torch.cat([question, target[None, :-1]], 1)
        logits = differentiable_cache.compute_logits(self.model, clean, fed, fed.shape[1]).to(self.model.dtype)
        right, fooled = self._is_right(query, said), False
        if query.misled:
            told = differentiable_cache.compute_logits(self.model, dirty, fed, len(said)).argmax(-1)
            fooled = bool((told != target).any()) and not (
                right and query.answer and self._is_right(query, told.tolist())
            )
        return TokenizedQuery(
            kind=query.kind, question=question, target=target, clean=logits, fooled=fooled, right=right
        )

    def _ids(self, draft: Draft) -> Int[Tensor, "1 seen"]:
        return self.frame.context(draft.text).to(self.model.device)

    def _question(self, query: Query) -> Int[Tensor, "1 question"]:
        return self.frame.question(query.question, query.prefix).to(self.model.device)

    def _is_right(self, query: Query, said: list[int]) -> bool:
        """Return whether a reply to the clean text has the answer, or begins with the quotation."""
        text = str(self.tokenizer.decode(said, skip_special_tokens=True))
        if query.verbatim:
            return text.split()[:_QUOTED_WORDS] == query.answer.split()[:_QUOTED_WORDS]
        return query.answer.lower() in text.lower()
