"""Conversations over one cache, whose messages can be erased."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from vestige import erasers
from vestige.cache import serialization
from vestige.cache.attach import attach
from vestige.cache.kv_cache import KVCache
from vestige.cache.prefill import prefill
from vestige.cache.report import Report
from vestige.erasers.base import Eraser, EraseReport
from vestige.erasers.erase import erase
from vestige.errors import CacheError, CacheFileError, InputError
from vestige.memory.base import Memory
from vestige.pipelines.answer import generate, limit_reply
from vestige.pipelines.message import Message
from vestige.policies.base import Policy
from vestige.policies.full import Full
from vestige.spans import PositionMap, Span
from vestige.text import locate
from vestige.text.chat_template import ChatTemplate
from vestige.utils.files import new_folder

_METADATA, _CACHE, FORMAT = "session.json", "cache", 1


class Session:
    """A conversation: turns share one cache, which its policy keeps small; every message is a span and can be erased.

    Args:
        model: The model; attached while it works.
        tokenizer: Fast tokenizer of the model.
        policy: Eviction policy; None keeps everything.
        memory: Memory of evicted pairs.
        eraser: Eraser that :meth:`erase` uses; None recomputes, which is exact and as slow as reading.
        system: System message; None leaves it to the chat template.
        chunk: Tokens per forward while reading. The cache is settled after a longer message; a shorter one stays whole.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        policy: Policy | None = None,
        memory: Memory | None = None,
        eraser: Eraser | None = None,
        *,
        system: str | None = None,
        chunk: int = 1024,
    ) -> None:
        self.model, self.template, self.chunk = model, ChatTemplate(tokenizer, system), chunk
        self.eraser = erasers.make("recompute") if eraser is None else eraser
        self.cache = KVCache(model, policy or Full(), memory=memory)
        self.messages: tuple[Message, ...] = ()
        self._pending: list[int] = []
        """The last token of a reply, which generation does not feed."""

    def send(
        self, text: str, *, max_new_tokens: int = 256, on_text: Callable[[str], None] | None = None, **options: Any
    ) -> str:
        """Send a message and return the reply.

        After an error or an interrupt the conversation is as it was before, except for pairs evicted in the meantime.

        Args:
            text: The message.
            max_new_tokens: Longest reply in tokens; it ends earlier where the model's positions end.
            on_text: Called with each piece of the reply as it comes.
            options: For ``model.generate``: ``do_sample=True, temperature=0.7``, ...; default: greedy.

        Raises:
            InputError: The message is empty, or no position is left for a reply.
        """
        if not text.strip():
            raise InputError("there is nothing in this message")
        ids, offsets = self.template.message(text)
        before = [*self._pending, *(self._between() if self.messages else self.template.opening())]
        after, seen = self.template.reply_opening(), max(self.cache.seen, default=0)
        length = seen + len(before) + len(ids) + len(after)
        longest = limit_reply(self.cache, length, max_new_tokens)
        batch = torch.tensor([[*before, *ids]], device=self.model.device)
        settles = not self.messages or len(ids) > self.chunk
        streamer = None if on_text is None else _Streamer(self.template, on_text)
        with torch.no_grad(), attach(self.model), self._roll_back_on_error():
            if self.cache.state.schedule.unsettled >= self.cache.policy.every:
                self.cache.settle()
            prefill(self.model, batch, self.cache, chunk=self.chunk, settle=settles)
            reply = generate(
                self.model, self.template.tokenizer, self.cache, torch.tensor([after]), max_new_tokens=longest,
                streamer=streamer, **options,
            )  # fmt: skip
        start = seen + len(before)
        user = Message(role="user", text=text, span=Span(start, start + len(ids)), offsets=tuple(offsets))
        self.messages += (user, self._reply_message(reply, length))
        return self.messages[-1].text

    def erase(self, *, message: int | None = None, text: str | None = None, span: Span | None = None) -> EraseReport:
        """Erase a message, a passage, or tokens from the conversation.

        Args:
            message: Number of a message, from 0; negative numbers count from the end.
            text: A passage that occurs once in all messages.
            span: Positions in the cache.

        Raises:
            InputError: Not exactly one of the three, no such message or passage, or it was erased already.
            CacheError: The eraser cannot serve this cache.
        """
        if sum(part is not None for part in (message, text, span)) != 1:
            raise InputError("give exactly one of message=, text= and span=")
        if message is not None:
            span = self._message_span(message)
        elif text is not None:
            span = self._passage_span(text)
        assert span is not None
        fed = max(self.cache.seen, default=0)
        is_pending = fed < span.end <= fed + len(self._pending)  # a reply's last token, which then is never fed
        in_cache = Span(span.start, fed) if is_pending else span
        pending = torch.tensor([self._pending], dtype=torch.long).view(1, -1)
        ids = torch.cat([self.cache.ids, pending], 1)
        done = erase(self.cache, in_cache, self.eraser, model=self.model, input_ids=ids)
        self._pending = [] if is_pending else self._pending
        moved = PositionMap((span,)) if self.eraser.renumbers else None
        self.messages = tuple(message.without(span, moved) for message in self.messages)
        return done.report

    def report(self) -> Report:
        """Return the report of the cache: pairs held, bytes, seconds."""
        return self.cache.report()

    def fork(self) -> "Session":
        """Return an independent copy of the conversation, which shares no storage with it."""
        copy = object.__new__(Session)
        vars(copy).update(vars(self))
        copy.cache, copy._pending = self.cache.fork(), list(self._pending)
        return copy

    def save(self, path: str | Path) -> None:
        """Write the conversation to a new folder: safetensors and JSON, complete or not at all.

        Raises:
            InputError: The folder exists and is not empty, or cannot be written.
        """
        metadata = {
            "format": FORMAT,
            "messages": [asdict(message) for message in self.messages],
            "pending": self._pending,
            "system": self.template.system,
            "chunk": self.chunk,
        }
        with new_folder(Path(path), "the conversation") as work:
            (work / _CACHE).mkdir()
            serialization.write(self.cache.state, self.cache.layers, work / _CACHE)
            (work / _METADATA).write_text(json.dumps(metadata, indent=1) + "\n")

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eraser: Eraser | None = None,
    ) -> "Session":
        """Read a saved conversation.

        Raises:
            CacheFileError: The files are missing, damaged, or were made with another model.
        """
        path = Path(path)
        cache = KVCache.load(path / _CACHE, model)
        try:
            metadata = json.loads((path / _METADATA).read_text())
            if metadata["format"] != FORMAT:
                raise CacheFileError(f"{path} has format {metadata['format']}, this version of vestige reads {FORMAT}")
            session = cls(
                model, tokenizer, cache.policy, cache.memory, eraser, system=metadata["system"], chunk=metadata["chunk"]
            )
            session.messages = tuple(map(Message.parse, metadata["messages"]))
            session._pending = [int(token) for token in metadata["pending"]]
        except CacheFileError:
            raise
        except Exception as error:
            raise CacheFileError(f"{path} is damaged: {_METADATA}: {type(error).__name__}: {error}") from None
        session.cache = cache
        return session

    @contextmanager
    def _roll_back_on_error(self) -> Iterator[None]:
        seen, schedule = max(self.cache.seen, default=0), replace(self.cache.state.schedule)
        try:
            yield
        except BaseException:
            with suppress(CacheError):  # layers of other kinds cannot undo an interrupted forward
                self.cache.crop(seen - max(self.cache.seen, default=0))
                # a crop counts as speculation, which every later turn would pay for
                self.cache.state.schedule.restore(schedule)
            raise

    def _between(self) -> list[int]:
        """Return the ids between the last reply and the next message, without an end token that the cache holds."""
        ids = self.template.next_opening()
        last = self.cache.ids[0, -1] if self.cache.ids.numel() else -1
        return ids[1:] if ids and not self._pending and int(last) == ids[0] else ids

    def _reply_message(self, reply: list[int], start: int) -> Message:
        """Return a reply as a message; its last token is fed in the next turn, unless it is an end token.

        Args:
            reply: Ids of the reply.
            start: Position of the first one.
        """
        fed = self.cache.seen[0] - start
        text = self.template.decode(reply)
        length = len(reply)
        while length and not self.template.decode(reply[length - 1 : length]):  # end tokens have no text
            length -= 1
        self._pending = reply[fed:] if length == len(reply) else []
        span = Span(start, start + length) if length else None
        offsets = tuple(self.template.reply_offsets(reply[:length]))
        return Message(role="assistant", text=text, span=span, offsets=offsets)

    def _message_span(self, number: int) -> Span:
        if not -len(self.messages) <= number < len(self.messages):
            raise InputError(f"there is no message {number}; the conversation has {len(self.messages)}, from 0")
        span = self.messages[number].span
        if span is None:
            raise InputError(f"message {number} was taken out already, or is empty")
        return span

    def _passage_span(self, text: str) -> Span:
        part = text.strip()
        found = [(number, message) for number, message in enumerate(self.messages) if part and part in message.text]
        if len(found) != 1:
            where = ", ".join(f"message {number}" for number, _ in found) or "no message"
            raise InputError(f"the passage {part[:40]!r} is in {where}; it must be in one")
        _, message = found[0]
        if message.span is None:
            raise InputError("this message was taken out already")
        inside = locate.find(message.text, text, message.offsets)
        return Span(message.span.start + inside.start, message.span.start + inside.end)


class _Streamer(BaseStreamer):
    """Passes on the text of a reply as it grows, whole characters only."""

    def __init__(self, template: ChatTemplate, on_text: Callable[[str], None]) -> None:
        self.template, self.on_text = template, on_text
        self.ids: list[int] = []
        self.printed = ""
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then the reply token by token."""
        if self.is_prompt:
            self.is_prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self.template.decode(self.ids)
        if text.endswith("�"):  # half a character
            return
        self.on_text(text[len(self.printed) :])
        self.printed = text

    def end(self) -> None:
        """Pass on the rest of the text, even half a character."""
        text = self.template.decode(self.ids)
        if len(text) > len(self.printed):
            self.on_text(text[len(self.printed) :])
