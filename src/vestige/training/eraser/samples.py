"""Turn drafts into samples: the model's own replies to the clean text are the targets.

Source: KVEraser, arXiv 2606.17034: the target is the model's reply to the clean text, and a sample is kept only if that
reply is right and the reply to the whole text is not. Differs: samples are made when they are needed, each from its own
seed, and drafts are tried until one is worth training on; several queries share a text, because reading it costs most;
stage 1 only quotes after an anchor; as an option, the reply may be wrong.
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
from vestige.text.chat_template import ChatTemplate, find_end_ids
from vestige.training.data.sentences import draw_sentences
from vestige.training.data.vocabulary import draw_weighted
from vestige.training.eraser import differentiable_cache
from vestige.training.eraser.differentiable_cache import Layer
from vestige.training.eraser.facts import draft_facts
from vestige.training.eraser.questions import Question, draft_distractor
from vestige.training.eraser.quotations import MIN_SENTENCES, draft_altered, draft_neighbour
from vestige.training.eraser.templates import Draft, Query
from vestige.training.sampler import derive_seed

_QUOTED_WORDS = 4
"""Words that a quotation must get right."""
_MIX = {"facts": 0.65, "altered": 0.25, "neighbour": 0.1, "question": 0.4}
"""Weights of the kinds in stage 2; questions only if there are any. Texts that do not suit a kind get facts."""


@dataclass(frozen=True, kw_only=True)
class EraserOptions:
    """Options of the samples and the loss.

    Raises:
        InputError: A number is out of range.
    """

    neighbours: int = 600
    """Samples of stage 1, which are all quotations across an erased passage; stage 2 has all kinds."""
    least: int = 300
    """Shortest text, in tokens, about."""
    most: int = 2000
    """Longest text, in tokens, about; lengths are drawn uniformly in their logarithm."""
    reply: int = 12
    """Longest reply, in tokens; longer replies are cut."""
    free_reply: int = 24
    """Longest reply, in tokens, if nothing opens it: the answer comes later."""
    right: bool = True
    """Whether the reply to the clean text must be right, as in the paper. If not, the passage must only change the
    reply, which is learned as it is."""
    nll: float = 0.0
    """Weight of the reply to the clean text as the one right answer, which makes replies surer than the model's own."""
    kl: float = 1.0
    """Weight of the divergence from the clean text's logits, over the reply."""
    question_kl: float = 0.25
    """Weight of the same divergence over the question."""
    tries: int = 8
    """Drafts tried for a sample; if none is worth training on, the first is taken."""
    passes: int = 1
    """Times each sample is trained on; making a sample costs several times as much as a pass."""
    pool: int = 64
    """Samples that the passes repeat before the next ones; the keys and values of their texts stay in memory."""
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
        """Return the number of the sample that the loop trains on at an index."""
        block, place = divmod(index, self.pool * self.passes)
        return block * self.pool + place % self.pool


@dataclass(frozen=True, kw_only=True)
class TokenizedQuery:
    """A query in tokens, with the model's reply to the clean text.

    Args:
        kind: Kind of the query.
        question: Follows the text.
        target: The reply, with its end token unless it was cut: when to stop is learned too.
        clean: Logits after each input token over the clean text, in the model's dtype.
        fooled: Whether the whole text gives another reply; False if the query does not require that.
        right: Whether the reply contains the query's answer.
    """

    kind: str
    question: Int[Tensor, "1 question"]
    target: Int[Tensor, " target"]
    clean: Float[Tensor, "inputs vocab"]
    fooled: bool
    right: bool

    @property
    def input_ids(self) -> Int[Tensor, "1 inputs"]:
        """The question, and the target without its last token."""
        return torch.cat([self.question, self.target[None, :-1]], 1)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text, the spans to erase, and the replies to learn.

    Args:
        ids: The text.
        spans: Erased tokens.
        queries: The main query first.
        layers: Keys and values of the text; None once they were dropped.
    """

    ids: Int[Tensor, "1 seen"]
    spans: tuple[Span, ...]
    queries: tuple[TokenizedQuery, ...]
    layers: Sequence[Layer] | None

    def without_layers(self) -> "Sample":
        """Return the sample without keys and values, to save memory."""
        return replace(self, layers=None)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Material of samples: sentences of each text, and optional questions about paragraphs."""

    texts: Sequence[Sequence[str]]
    questions: Sequence[Question] = ()


class SampleMaker:
    """Make samples of drafts from the model's replies with and without the erased passages."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: EraserOptions) -> None:
        self.model, self.tokenizer, self.template, self.options = model, tokenizer, ChatTemplate(tokenizer), options
        self.stop = find_end_ids(model, tokenizer)

    @torch.no_grad()
    def make_sample(self, name: tuple[str | int, ...], sources: Sources, *, neighbours: bool) -> Sample:
        """Return the first of several drafts that is worth training on, as a sample.

        Args:
            name: Determines all random choices, together with the seed.
            sources: Material of the drafts.
            neighbours: True for stage 1, False for all kinds.

        Raises:
            InputError: The model replies to no draft.
        """
        rng = random.Random(derive_seed(self.options.seed, *name))
        mix = {kind: weight for kind, weight in _MIX.items() if kind != "question" or sources.questions}
        kind = "neighbour" if neighbours else draw_weighted(rng, mix)
        drafts: list[Draft] = []
        for attempt in range(self.options.tries):
            drafts.append(self._draft(random.Random(derive_seed(self.options.seed, *name, attempt)), sources, kind))
            if sample := self._find_worthwhile(drafts[-1]):
                return sample
        for draft in drafts:  # none is worth it: the first that the model replies to
            layers = differentiable_cache.read(self.model, ids := self._ids(draft))
            if sample := self._make_sample(draft, ids, layers, worth=False):
                return sample
        question = drafts[0].queries[0].question
        raise InputError(f"the model says nothing to {question!r} and the like: is it a model that answers?")

    def _draft(self, rng: random.Random, sources: Sources, kind: str) -> Draft:
        length = round(self.options.least * (self.options.most / self.options.least) ** rng.random())
        text, other = rng.choice(sources.texts), rng.choice(sources.texts)
        sentences = draw_sentences(rng, text, length, self._count_tokens, fewest=MIN_SENTENCES + 2)
        draft: Draft | None = None
        if kind == "neighbour":
            draft = draft_neighbour(rng, sentences, other)
        elif kind == "altered":
            draft = draft_altered(rng, sentences, other)
        elif kind == "question":
            draft = draft_distractor(rng, sources.questions, sum(map(len, sentences)))
        return draft or draft_facts(rng, sentences)

    def _count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _find_worthwhile(self, draft: Draft) -> Sample | None:
        """Return the draft, or its flipped form, as a sample; None if neither is worth training on."""
        layers = differentiable_cache.read(self.model, ids := self._ids(draft))
        for candidate in filter(None, (draft, draft.flipped())):
            main = candidate.queries[0]
            if main.misled and main.answer and self._is_right(main, self._greedy_answer(main, layers)):
                continue  # the passage misleads nobody: no need to read the clean text
            if sample := self._make_sample(candidate, ids, layers, worth=True):
                return sample
        return None

    def _make_sample(
        self, draft: Draft, ids: Int[Tensor, "1 seen"], layers: Sequence[Layer], *, worth: bool
    ) -> Sample | None:
        """Return a draft with the model's replies to the clean text.

        None if the model does not reply to the main query, or if the sample must be ``worth`` training on and is not.
        """
        offsets = self.template.offsets(draft.text)
        spans = tuple(locate.tokens_at(draft.text, start, end, offsets) for start, end in draft.spans)
        first = spans[0].start
        rest = ids[:, ~within(torch.arange(ids.shape[1], device=ids.device), spans)][:, first:]
        before = [(keys[:, :, :first], values[:, :, :first]) for keys, values in layers]
        clean = differentiable_cache.read(self.model, rest, before) if rest.shape[1] else before
        query, *others = draft.queries
        reply = self._greedy_answer(query, clean) if query.answer else []
        if query.answer and not self._is_right(query, reply):
            if worth and self.options.right:
                return None  # before any other query is run
            reply = []
        main = self._compare(query, reply, clean, layers)
        if main is None or (worth and not self._is_worthwhile(query, main)):
            return None
        further = (self._compare_further(other, clean, layers) for other in others)
        return Sample(ids=ids, spans=spans, queries=(main, *filter(None, further)), layers=layers)

    def _is_worthwhile(self, query: Query, tokenized: TokenizedQuery) -> bool:
        """Return whether the replies to the main query make the text worth training on."""
        return (tokenized.right or not self.options.right) and (tokenized.fooled or not query.misled)

    def _compare_further(self, query: Query, clean: Sequence[Layer], dirty: Sequence[Layer]) -> TokenizedQuery | None:
        """Return a query if the model answers it right; a wrong reply that is opened costs one forward pass."""
        if not query.prefix:
            tokenized = self._compare(query, [], clean, dirty)
            return tokenized if tokenized and (tokenized.right or not self.options.right) else None
        reply = self._greedy_answer(query, clean)
        return self._compare(query, reply, clean, dirty) if self._is_right(query, reply) else None

    def _greedy_answer(self, query: Query, layers: Sequence[Layer]) -> list[int]:
        """Return the greedy reply up to its first token that departs from the answer, in one forward pass."""
        encoded: Any = self.tokenizer(f" {query.answer}".rstrip(), add_special_tokens=False)
        guess = encoded["input_ids"][: self.options.reply - 1]
        ids = torch.cat([question := self._question(query), question.new_tensor([guess])], 1)
        logits = differentiable_cache.compute_logits(self.model, layers, ids, len(guess) + 1)
        reply = list[int]()
        for token, expected in zip(logits.argmax(-1).tolist(), [*guess, None], strict=True):
            if token in self.stop:
                break
            reply.append(token)
            if token != expected:
                break
        return reply

    def _compare(
        self, query: Query, reply: list[int], clean: Sequence[Layer], dirty: Sequence[Layer]
    ) -> TokenizedQuery | None:
        """Return a query with the whole reply to the clean text, compared with the reply to the whole text.

        The first tokens of the reply may be known already. None if there is no reply.
        """
        question = self._question(query)
        begun = torch.cat([question, question.new_tensor([reply])], 1) if reply else question
        limit = self.options.reply if query.prefix else self.options.free_reply
        reply = [*reply, *differentiable_cache.greedy_reply(self.model, clean, begun, limit - len(reply), self.stop)]
        if reply[0] in self.stop:
            return None
        target = torch.tensor(reply, device=question.device)
        ids = torch.cat([question, target[None, :-1]], 1)
        logits = differentiable_cache.compute_logits(self.model, clean, ids, ids.shape[1]).to(self.model.dtype)
        right, fooled = self._is_right(query, reply), False
        if query.misled:
            other = differentiable_cache.compute_logits(self.model, dirty, ids, len(reply)).argmax(-1)
            still_right = right and query.answer and self._is_right(query, other.tolist())
            fooled = bool((other != target).any()) and not still_right
        return TokenizedQuery(
            kind=query.kind, question=question, target=target, clean=logits, fooled=fooled, right=right
        )

    def _ids(self, draft: Draft) -> Int[Tensor, "1 seen"]:
        return self.template.context(draft.text).to(self.model.device)

    def _question(self, query: Query) -> Int[Tensor, "1 question"]:
        return self.template.question(query.question, query.prefix).to(self.model.device)

    def _is_right(self, query: Query, reply: list[int]) -> bool:
        """Return whether a reply contains the answer, or begins with the quotation."""
        text = str(self.tokenizer.decode(reply, skip_special_tokens=True))
        if query.verbatim:
            return text.split()[:_QUOTED_WORDS] == query.answer.split()[:_QUOTED_WORDS]
        return query.answer.lower() in text.lower()
