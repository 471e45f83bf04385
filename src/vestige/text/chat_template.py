"""Text in, token ids out: files, and the chat text around a context and a question."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError

_CONTEXT, _QUESTION, _REPLY, _NEXT = (f"\ue000{word}\ue000" for word in ("context", "question", "reply", "next"))
"""Private use characters: no text has them."""


@dataclass(frozen=True)
class Frame:
    """The chat text of one model around a context and a question.

    A conversation of one user message, context + newline + question, is cut at the end of the context, and each part
    is tokenised on its own: so a context can be read, evicted and saved before any question is known. Without a chat
    template it is BOS + context + newline + question + newline.
    """

    tokenizer: PreTrainedTokenizerBase

    def context(self, text: str) -> Int[Tensor, "1 context"]:
        """Return the ids of everything up to the end of the context."""
        before, _, _ = self._parts()
        return self._ids(before + text)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return which characters of a context each of its ids stands for; before 0 is what the chat text brings.

        Raises:
            InputError: The tokenizer does not say (only fast ones do).
        """
        if not self.tokenizer.is_fast:
            raise InputError(f"{type(self.tokenizer).__name__} does not say where its tokens come from; use a fast one")
        before, _, _ = self._parts()
        encoded: Any = self.tokenizer(
            before + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [(start - len(before), end - len(before)) for start, end in encoded["offset_mapping"]]

    def question(self, text: str, answer_prefix: str = "") -> Int[Tensor, "1 question"]:
        """Return the ids of everything behind the context: the question, and what opens the reply."""
        _, between, after = self._parts()
        return self._ids(between + text + after + answer_prefix)

    def next_context(self, text: str) -> Int[Tensor, "1 context"]:
        """Return the ids that follow a reply: what closes it, and the next message up to the end of its context.

        What closes a reply begins with the token that ended it, if the model wrote one: do not feed it twice.
        """
        if not self.tokenizer.chat_template:
            return self._ids("\n" + text)
        first = {"role": "user", "content": _QUESTION}
        talk = [first, {"role": "assistant", "content": _REPLY}, {"role": "user", "content": f"{_NEXT}\n{_QUESTION}"}]
        chat = str(self.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
        _, _, rest = chat.partition(_REPLY)
        return self._ids(rest.partition(_NEXT)[0] + text)

    def _parts(self) -> tuple[str, str, str]:
        """Return the text before the context, between context and question, and after the question."""
        if not self.tokenizer.chat_template:
            return self.tokenizer.bos_token or "", "\n", "\n"
        message = {"role": "user", "content": f"{_CONTEXT}\n{_QUESTION}"}
        chat = self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        before, _, rest = str(chat).partition(_CONTEXT)
        between, _, after = rest.partition(_QUESTION)
        return before, between, after

    def _ids(self, text: str) -> Tensor:
        encoded: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return torch.tensor([encoded["input_ids"]], dtype=torch.long)


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        InputError: It is missing, a folder, unreadable, not UTF-8 text, or empty.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    if "\x00" in text:
        raise InputError(f"{path} is not text: it has NUL bytes")
    return require_text(text, str(path))


def require_text(text: str, name: str) -> str:
    """Return the text, or raise an InputError if there is nothing in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} is not UTF-8 text") from None
    if not text.strip():
        raise InputError(f"{name} is empty")
    return text


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end a reply: the generation config's, or the tokenizer's."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (int(ends),)
