"""Tales as token ids: documents with questions and answers, several behind each other in one sequence."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.text.chat_template import Frame
from vestige.text.turns import Turns
from vestige.training.data.sentences import draw_sentences
from vestige.training.data.synthetic_qa.story import Question, make_story
from vestige.training.sampler import derive_seed

_TRIES = 8
_FEWEST = 4
"""Sentences that a tale needs."""
_TEXT = 0.5, 0.9
"""Share of a document that is tried for its text: what is left is for questions, and one reading serves all of them."""


_MESSAGES = (1, 1, 1, 2, 3)
"""Over how many messages a talk is spread, drawn evenly."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Texts, each in a message of its own, and what is asked.

    Args:
        texts: In order.
        between: Asked, and answered, behind each text but the last.
        asked: Behind all of them, about any.
    """

    texts: tuple[str, ...]
    between: tuple[Question, ...]
    asked: tuple[Question, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A talk in tokens.

    Args:
        ids: Texts, questions and answers, turn by turn.
        context: Tokens up to the end of the last text: what is evicted before any question behind it is seen.
        answers: Places whose next token belongs to an answer, or ends one.
    """

    ids: tuple[int, ...]
    context: int
    answers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PackedSequence:
    """Documents behind each other.

    Args:
        ids: Of all.
        starts: Where the document of each token begins.
        sizes: Tokens of the document of each token.
        texts: Tokens of each document's text, which stands before its questions.
        answers: Places whose next token belongs to an answer.
        others: Some places of the texts.
    """

    ids: Int[Tensor, "1 tokens"]
    starts: Int[Tensor, " tokens"]
    sizes: Int[Tensor, " tokens"]
    texts: Int[Tensor, " documents"]
    answers: Int[Tensor, " answers"]
    others: Int[Tensor, " others"]

    def to(self, device: torch.device) -> "PackedSequence":
        """Return the same on a device."""
        return PackedSequence(**{name: x.to(device) for name, x in vars(self).items()})

    def documents(self) -> Iterator["TokenizedDocument"]:
        """Yield each document by itself."""
        for start, text in zip(self.starts.unique_consecutive().tolist(), self.texts.tolist(), strict=True):
            end = start + int(self.sizes[start])
            answers = self.answers[(self.answers >= start) & (self.answers < end)] - start
            yield TokenizedDocument(ids=self.ids[:, start:end], text=text, answers=answers)


@dataclass(frozen=True, kw_only=True)
class TokenizedDocument:
    """One of the documents of a sequence, its places counted from its begin.

    Args:
        ids: Text, questions and answers.
        text: Tokens of the text.
        answers: Places whose next token belongs to an answer.
    """

    ids: Int[Tensor, "1 tokens"]
    text: int
    answers: Int[Tensor, " answers"]


class SequenceMaker:
    """Makes sequences of tales about prose, each a function of its name alone.

    Args:
        tokenizer: The model's.
        length: Most tokens of a sequence.
        least: Fewest tokens that a document is given.
        others: Places of the texts to look at, beside the answers.
        asked: Most questions about one text.
        seed: Everything that is drawn follows from it and a name.

    Raises:
        InputError: The numbers do not go together.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, length: int, least: int, others: int, asked: int = 4, seed: int
    ) -> None:
        if not 96 <= least <= length or others < 0:
            raise InputError(f"need 96 <= least <= length and others >= 0, got {least}, {length} and {others}")
        self.tokenizer, self.frame, self.turns = tokenizer, Frame(tokenizer), Turns(tokenizer)
        self.length, self.least, self.others, self.asked, self.seed = length, least, others, asked, seed

    def make_sequence(self, name: tuple[str | int, ...], prose: Sequence[Sequence[str]]) -> PackedSequence:
        """Return a sequence.

        Args:
            name: What everything that is drawn follows from.
            prose: Sentences by document.

        Raises:
            InputError: Not even one tale fits.
        """
        rng = random.Random(derive_seed(self.seed, *name))
        documents: list[Document] = []
        room = self.length
        while room >= self.least:
            size = round(self.least * (self.length / self.least) ** rng.random())
            told = self.fit_conversation(rng, prose, min(size, room))
            if told is None and not documents:
                told = self.fit_conversation(rng, prose, room)
            if told is None:
                break
            documents.append(self.tokens(told))
            room -= len(documents[-1].ids)
        if not documents:
            raise InputError(f"no tale fits into {self.length} tokens: give --length more")
        return self._packed(rng, documents)

    def fit_conversation(self, rng: random.Random, prose: Sequence[Sequence[str]], size: int) -> Conversation | None:
        """Return a talk that fits so many tokens, most of them its texts'; None if none of some does."""
        text = rng.choice(prose)
        room = round(size * rng.uniform(*_TEXT))
        for _ in range(_TRIES):
            talk = self.talk(rng, text, room)
            for count in range(len(talk.asked), 0, -1):
                fewer = replace(talk, asked=talk.asked[:count])
                if len(self.tokens(fewer).ids) <= size:
                    return fewer
            room -= size // 6
        return None

    def talk(self, rng: random.Random, text: Sequence[str], room: int) -> Conversation:
        """Return a talk about sentences of so many tokens in all, about."""
        messages = rng.choice(_MESSAGES)
        tales = [make_story(rng, self.cut(rng, text, room // messages)) for _ in range(messages)]
        between = [one for told in tales[:-1] for one in told.asked[:1]]
        asked = [one for told in tales for one in told.asked if one not in between]
        rng.shuffle(asked)
        return Conversation(
            texts=tuple(told.text for told in tales),
            between=tuple(between),
            asked=tuple(asked[: self.asked]) if all(told.asked for told in tales) else (),
        )

    def tokens(self, talk: Conversation) -> Document:
        """Return a talk in tokens, every question a turn of its own, the first behind a text in its message."""
        ids = self.context(talk)
        context, answers = len(ids), list[int]()
        for number, asked in enumerate(talk.asked):
            ids += self.question(asked, first=number == 0)
            reply = [*self.answer(asked), self.turns.next_opening()[0]]
            answers += range(len(ids) - 1, len(ids) + len(reply) - 1)
            ids += reply
        return Document(ids=tuple(ids), context=context, answers=tuple(answers))

    def context(self, talk: Conversation) -> list[int]:
        """Return everything up to the end of the last text."""
        ids = list(self.frame.context(talk.texts[0])[0].tolist())
        for asked, text in zip(talk.between, talk.texts[1:], strict=True):
            ids += [*self.question(asked, first=True), *self.answer(asked)]
            ids += self.frame.next_context(text)[0].tolist()
        return ids

    def question(self, asked: Question, *, first: bool) -> list[int]:
        """Return what stands between the text, or the answer before, and an answer."""
        if first:
            return list(self.frame.question(asked.question, asked.prefix)[0].tolist())
        after_end = self.turns.next_opening()[1:]
        return [*after_end, *self.turns.message(asked.question)[0], *self.turns.asking(), *self._ids(asked.prefix)]

    def answer(self, asked: Question) -> list[int]:
        """Return an answer behind its prefix."""
        return self._ids(f" {asked.answer}")

    def cut(self, rng: random.Random, text: Sequence[str], room: int) -> list[str]:
        """Return sentences from a random one on, going round, of so many tokens in all, about."""
        return draw_sentences(rng, text, room, lambda one: len(self._ids(one)), fewest=_FEWEST)

    def _packed(self, rng: random.Random, documents: Sequence[Document]) -> PackedSequence:
        starts, sizes, answers, texts = list[int](), list[int](), list[int](), list[int]()
        for one in documents:
            start = len(starts)
            starts += [start] * len(one.ids)
            sizes += [len(one.ids)] * len(one.ids)
            answers += [start + at for at in one.answers]
            texts += range(start, start + one.context)
        others = sorted(rng.sample(texts, min(self.others, len(texts))))
        ids = [token for one in documents for token in one.ids]
        return PackedSequence(
            ids=torch.tensor([ids]),
            starts=torch.tensor(starts),
            sizes=torch.tensor(sizes),
            texts=torch.tensor([one.context for one in documents]),
            answers=torch.tensor(answers),
            others=torch.tensor(others, dtype=torch.long),
        )

    def _ids(self, text: str) -> list[int]:
        encoded: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])
