"""The chat text around the messages of a conversation, each message tokenised on its own: so each is a span."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

_MESSAGE, _REPLY, _NEXT = (f"\ue000{word}\ue000" for word in ("message", "reply", "next"))
"""Private use characters: no text has them."""


@dataclass(frozen=True)
class Turns:
    """What stands before, between and behind messages, as token ids. Without a chat template it is line breaks."""

    tokenizer: PreTrainedTokenizerBase
    system: str | None = None
    """First message of the conversation; None leaves it to the template."""

    def opening(self) -> list[int]:
        """Return what stands before the first message of the user."""
        return self._ids(self._rendered([_user(_MESSAGE)]).partition(_MESSAGE)[0])

    def asking(self) -> list[int]:
        """Return what stands between a message of the user and the reply."""
        return self._ids(self._rendered([_user(_MESSAGE)]).partition(_MESSAGE)[2])

    def next_opening(self) -> list[int]:
        """Return what stands between a reply and the next message; it begins with what ends a reply."""
        talk = [_user(_MESSAGE), {"role": "assistant", "content": _REPLY}, _user(_NEXT)]
        return self._ids(self._rendered(talk).partition(_REPLY)[2].partition(_NEXT)[0])

    def message(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a message, and the characters that each stands for."""
        encoded: Any = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), [tuple(pair) for pair in encoded["offset_mapping"]]

    def reply_offsets(self, ids: list[int]) -> list[tuple[int, int]]:
        """Return the characters that each token of a reply stands for, by what is said once it is there."""
        ends = [len(self.text(ids[: i + 1])) for i in range(len(ids))]
        return list(zip([0, *ends], ends, strict=False))

    def text(self, ids: list[int]) -> str:
        """Return what a reply says."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _rendered(self, talk: list[dict[str, str]]) -> str:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        if not self.tokenizer.chat_template:
            lines = [one["content"] for one in (*first, *talk)]
            return (self.tokenizer.bos_token or "") + "\n".join([*lines, ""])
        return str(self.tokenizer.apply_chat_template(first + talk, tokenize=False, add_generation_prompt=True))

    def _ids(self, text: str) -> list[int]:
        encoded: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
