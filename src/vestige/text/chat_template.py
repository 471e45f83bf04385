"""Chat templates: the text that a model puts around messages, in token ids."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError

_CONTEXT, _QUESTION, _REPLY = (f"\ue000{word}\ue000" for word in ("context", "question", "reply"))
"""Placeholders of private use characters, which no text has."""


@dataclass(frozen=True)
class ChatTemplate:
    """The chat text of one model, cut into parts that are tokenised on their own.

    A document and a question about it are one message of the user, context + newline + question, cut after the
    context. So a context can be read, evicted and saved before any question is known. In a conversation each message
    is a part, so each is a span. A tokenizer without a chat template gets BOS, and a newline after each message.

    Args:
        tokenizer: Tokenizer of the model.
        system: First message of the conversation; None leaves it to the template.
    """

    tokenizer: PreTrainedTokenizerBase
    system: str | None = None

    def context(self, text: str) -> Int[Tensor, "1 context"]:
        """Return the ids of everything up to the end of the context."""
        before, _, _ = self._parts()
        return self._as_batch(before + text)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return the characters of a context that each of its ids stands for; the template's own have negative numbers.

        Raises:
            InputError: The tokenizer gives no offsets (only fast ones do).
        """
        if not self.tokenizer.is_fast:
            raise InputError(f"{type(self.tokenizer).__name__} does not say where its tokens come from; use a fast one")
        before, _, _ = self._parts()
        _, offsets = self.message(before + text)
        return [(start - len(before), end - len(before)) for start, end in offsets]

    def question(self, text: str, answer_prefix: str = "") -> Int[Tensor, "1 question"]:
        """Return the ids of everything after the context: the question, and the opening of the reply."""
        _, between, after = self._parts()
        return self._as_batch(between + text + after + answer_prefix)

    def next_context(self, text: str) -> Int[Tensor, "1 context"]:
        """Return the ids that follow a reply: its closing, and the next message up to the end of its context.

        The closing begins with the token that ended the reply, if the model wrote one: do not feed it twice.
        """
        return self._as_batch(self._between_turns() + text)

    def opening(self) -> list[int]:
        """Return the ids before the first message of the user."""
        return self._ids(self._parts()[0])

    def reply_opening(self) -> list[int]:
        """Return the ids between a message of the user and the reply."""
        return self._ids(self._parts()[2])

    def next_opening(self) -> list[int]:
        """Return the ids between a reply and the next message; they begin with the token that ends a reply."""
        return self._ids(self._between_turns())

    def message(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a message, and the characters that each of them stands for."""
        encoded: Any = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), [tuple(pair) for pair in encoded["offset_mapping"]]

    def decode(self, ids: list[int]) -> str:
        """Return the text of a reply."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def reply_offsets(self, ids: list[int]) -> list[tuple[int, int]]:
        """Return the characters that each token of a reply adds to its text."""
        ends = [len(self.decode(ids[: i + 1])) for i in range(len(ids))]
        return list(zip([0, *ends], ends, strict=False))

    def _parts(self) -> tuple[str, str, str]:
        """Return the text before the context, between context and question, and after the question."""
        before, _, rest = self._render([_user(f"{_CONTEXT}\n{_QUESTION}")]).partition(_CONTEXT)
        between, _, after = rest.partition(_QUESTION)
        return before, between, after

    def _between_turns(self) -> str:
        """Return the text between a reply and the next message."""
        messages = [_user(_QUESTION), {"role": "assistant", "content": _REPLY}, _user(f"{_CONTEXT}\n{_QUESTION}")]
        return self._render(messages).partition(_REPLY)[2].partition(_CONTEXT)[0]

    def _render(self, messages: list[dict[str, str]]) -> str:
        """Return the chat text of messages, up to the opening of a reply."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        if not self.tokenizer.chat_template:
            lines = [message["content"] for message in (*first, *messages)]
            return (self.tokenizer.bos_token or "") + "\n".join([*lines, ""])
        return str(self.tokenizer.apply_chat_template(first + messages, tokenize=False, add_generation_prompt=True))

    def _ids(self, text: str) -> list[int]:
        encoded: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])

    def _as_batch(self, text: str) -> Int[Tensor, "1 _tokens"]:
        return torch.tensor([self._ids(text)], dtype=torch.long)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def find_end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end a reply: the generation config's, or the tokenizer's."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (int(ends),)
