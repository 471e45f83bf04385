"""Tokenize stories as conversations, and pack several of them into one training sequence."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.text.chat_template import ChatTemplate
from vestige.training.data.sentences import draw_sentences
from vestige.training.data.synthetic_qa.story import Question, make_story
from vestige.training.sampler import derive_seed

_TRIES = 8
_FEWEST_SENTENCES = 4
_TEXT_SHARE = 0.5, 0.9
"""Range of the share of a document that its texts get; the rest is for questions, and one reading serves them all."""
_MESSAGES = (1, 1, 1, 2, 3)
"""Numbers of messages of a conversation, each equally likely."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Texts, each in a message of its own, and questions about them.

    Args:
        texts: In order.
        interim: A question, with its answer, after each text but the last.
        questions: Questions after the last text, about any of them.
    """

    texts: tuple[str, ...]
    interim: tuple[Question, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True, kw_only=True)
class TokenizedDocument:
    """A conversation in tokens.

    Args:
        ids: Texts, questions and answers.
        text: Number of tokens up to the end of the last text; evictions happen there, before any later question.
        answers: Positions whose next token belongs to an answer or ends it.
    """

    ids: Int[Tensor, "1 tokens"]
    text: int
    answers: Int[Tensor, " answers"]


@dataclass(frozen=True, kw_only=True)
class PackedSequence:
    """Several documents in one sequence.

    Args:
        ids: Tokens of all documents.
        starts: Position at which the document of each token begins.
        sizes: Length of the document of each token.
        texts: Length of each document's text, which its questions follow.
        answers: Positions whose next token belongs to an answer.
        others: Randomly drawn positions in the texts.
    """

    ids: Int[Tensor, "1 tokens"]
    starts: Int[Tensor, " tokens"]
    sizes: Int[Tensor, " tokens"]
    texts: Int[Tensor, " documents"]
    answers: Int[Tensor, " answers"]
    others: Int[Tensor, " others"]

    def to(self, device: torch.device) -> "PackedSequence":
        """Return the sequence on a device."""
        return PackedSequence(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def documents(self) -> Iterator[TokenizedDocument]:
        """Yield the documents; their positions count from the document's own start."""
        for start, text in zip(self.starts.unique_consecutive().tolist(), self.texts.tolist(), strict=True):
            end = start + int(self.sizes[start])
            answers = self.answers[(self.answers >= start) & (self.answers < end)] - start
            yield TokenizedDocument(ids=self.ids[:, start:end], text=text, answers=answers)


class SequenceMaker:
    """Make sequences of stories, each a function of its name alone.

    Args:
        tokenizer: The model's tokenizer.
        length: Most tokens of a sequence.
        least: Fewest tokens planned for a document.
        others: Number of text positions to train on, beside the answers.
        asked: Most questions after the last text of a conversation.
        seed: All random choices follow from it and the sequence's name.

    Raises:
        InputError: The numbers contradict each other.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, length: int, least: int, others: int, asked: int = 4, seed: int
    ) -> None:
        if not 96 <= least <= length or others < 0:
            raise InputError(f"need 96 <= least <= length and others >= 0, got {least}, {length} and {others}")
        self.tokenizer, self.template = tokenizer, ChatTemplate(tokenizer)
        self.length, self.least, self.others, self.asked, self.seed = length, least, others, asked, seed

    def make_sequence(self, name: tuple[str | int, ...], texts: Sequence[Sequence[str]]) -> PackedSequence:
        """Return the sequence of a name.

        Args:
            name: Determines all random choices, together with the seed.
            texts: Sentences of each source text.

        Raises:
            InputError: Not even one story fits.
        """
        rng = random.Random(derive_seed(self.seed, *name))
        documents: list[TokenizedDocument] = []
        room = self.length
        while room >= self.least:
            size = round(self.least * (self.length / self.least) ** rng.random())
            conversation = self.fit_conversation(rng, texts, min(size, room))
            if conversation is None and not documents:
                conversation = self.fit_conversation(rng, texts, room)
            if conversation is None:
                break
            documents.append(self.tokenize(conversation))
            room -= documents[-1].ids.shape[1]
        if not documents:
            raise InputError(f"no tale fits into {self.length} tokens: give --length more")
        return self._pack(rng, documents)

    def fit_conversation(self, rng: random.Random, texts: Sequence[Sequence[str]], size: int) -> Conversation | None:
        """Return a conversation of at most ``size`` tokens, most of them in its texts; None if no attempt fits."""
        sentences = rng.choice(texts)
        room = round(size * rng.uniform(*_TEXT_SHARE))
        for _ in range(_TRIES):
            conversation = self.make_conversation(rng, sentences, room)
            for count in range(len(conversation.questions), 0, -1):
                shorter = replace(conversation, questions=conversation.questions[:count])
                if self.tokenize(shorter).ids.shape[1] <= size:
                    return shorter
            room -= size // 6
        return None

    def make_conversation(self, rng: random.Random, sentences: Sequence[str], room: int) -> Conversation:
        """Return a conversation whose texts have about ``room`` tokens in all."""
        messages = rng.choice(_MESSAGES)
        stories = []
        for _ in range(messages):
            filler = draw_sentences(rng, sentences, room // messages, self._count, fewest=_FEWEST_SENTENCES)
            stories.append(make_story(rng, filler))
        interim = [question for story in stories[:-1] for question in story.questions[:1]]
        questions = [question for story in stories for question in story.questions if question not in interim]
        rng.shuffle(questions)
        return Conversation(
            texts=tuple(story.text for story in stories),
            interim=tuple(interim),
            questions=tuple(questions[: self.asked]) if all(story.questions for story in stories) else (),
        )

    def tokenize(self, conversation: Conversation) -> TokenizedDocument:
        """Return a conversation in tokens; the first question continues the last text's message."""
        ids = self.context_ids(conversation)
        text, answers = len(ids), list[int]()
        for number, question in enumerate(conversation.questions):
            ids += self.question_ids(question, first=number == 0)
            reply = [*self.answer_ids(question), self.template.next_opening()[0]]
            answers += range(len(ids) - 1, len(ids) + len(reply) - 1)
            ids += reply
        return TokenizedDocument(ids=torch.tensor([ids]), text=text, answers=torch.tensor(answers, dtype=torch.long))

    def context_ids(self, conversation: Conversation) -> list[int]:
        """Return the ids up to the end of the last text."""
        ids = list(self.template.context(conversation.texts[0])[0].tolist())
        for question, text in zip(conversation.interim, conversation.texts[1:], strict=True):
            ids += [*self.question_ids(question, first=True), *self.answer_ids(question)]
            ids += self.template.next_context(text)[0].tolist()
        return ids

    def question_ids(self, question: Question, *, first: bool) -> list[int]:
        """Return the ids between the text, or the previous answer, and the answer to a question."""
        if first:
            return list(self.template.question(question.question, question.prefix)[0].tolist())
        opening = self.template.next_opening()[1:]  # the end of the previous reply is there already
        message = self.template.message(question.question)[0]
        return [*opening, *message, *self.template.reply_opening(), *self._ids(question.prefix)]

    def answer_ids(self, question: Question) -> list[int]:
        """Return the ids of an answer, without its prefix."""
        return self._ids(f" {question.answer}")

    def _count(self, text: str) -> int:
        return len(self._ids(text))

    def _pack(self, rng: random.Random, documents: Sequence[TokenizedDocument]) -> PackedSequence:
        sizes = torch.tensor([document.ids.shape[1] for document in documents])
        starts = sizes.cumsum(0) - sizes
        texts = torch.tensor([document.text for document in documents])
        inside = [i for start, text in zip(starts, texts, strict=True) for i in range(int(start), int(start + text))]
        others = sorted(rng.sample(inside, min(self.others, len(inside))))
        return PackedSequence(
            ids=torch.cat([document.ids for document in documents], 1),
            starts=starts.repeat_interleave(sizes),
            sizes=sizes.repeat_interleave(sizes),
            texts=texts,
            answers=torch.cat([start + document.answers for start, document in zip(starts, documents, strict=True)]),
            others=torch.tensor(others, dtype=torch.long),
        )

    def _ids(self, text: str) -> list[int]:
        encoded: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])
