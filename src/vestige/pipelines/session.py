"""A conversation over one cache, whose messages can be erased."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
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
from vestige.models.compat import cache_argument
from vestige.pipelines.answer import check_room
from vestige.policies.base import Policy
from vestige.policies.full import Full
from vestige.spans import PositionMap, Span
from vestige.text import locate
from vestige.text.turns import Turns
from vestige.utils.files import new_folder

_BOOKS, _CACHE, FORMAT = "session.json", "cache", 1


@dataclass(frozen=True, kw_only=True)
class Message:
    """What was said, and where it stands.

    Args:
        role: "user" or "assistant".
        text: As it was said; erasing does not change it.
        span: Its tokens in the cache; None once they were taken out of the sequence.
        offsets: Characters of the text that each of its tokens stands for, those taken out left out.
        erased: Parts of the text that were erased, as characters.
    """

    role: str
    text: str
    span: Span | None
    offsets: tuple[tuple[int, int], ...]
    erased: tuple[tuple[int, int], ...] = ()


class Session:
    """A conversation: turns share one cache, which its policy keeps small; every message is a span and can be erased.

    Args:
        model: The model; attached while it works.
        tokenizer: The model's, a fast one.
        policy: What to keep; None keeps everything.
        memory: What remains of the evicted.
        eraser: What :meth:`erase` does; None recomputes, which is exact and as slow as reading.
        system: The system message; None leaves it to the chat template.
        chunk: Tokens per forward while reading; a longer message is settled behind its end, a shorter one stays whole.
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
        self.model, self.turns, self.chunk = model, Turns(tokenizer, system), chunk
        self.eraser = erasers.make("recompute") if eraser is None else eraser
        self.cache = KVCache(model, policy or Full(), memory=memory)
        self.messages: tuple[Message, ...] = ()
        self._pending: list[int] = []
        """The reply's last token, which generation does not feed."""

    def send(
        self, text: str, *, max_new_tokens: int = 256, on_text: Callable[[str], None] | None = None, **options: Any
    ) -> str:
        """Say something and return the reply.

        Args:
            text: The message.
            max_new_tokens: Bound of the reply; it is cut short where the model's positions end.
            on_text: Called with each piece of the reply as it comes.
            options: For ``model.generate``: ``do_sample=True, temperature=0.7``, ...; default: greedy.

        Raises:
            InputError: Nothing was said, or no position is left for a reply.

        After an error or an interrupt the conversation is as it was, but for what was evicted meanwhile.
        """
        if not text.strip():
            raise InputError("there is nothing in this message")
        said, offsets = self.turns.message(text)
        before = [*self._pending, *(self._between() if self.messages else self.turns.opening())]
        after, seen = self.turns.asking(), max(self.cache.seen, default=0)
        limit, length = self.cache.layout.max_positions, seen + len(before) + len(said) + len(after)
        check_room(limit, length)
        room = max_new_tokens if limit is None else min(max_new_tokens, limit - length)
        with torch.no_grad(), attach(self.model), self._taken_back_on_error():
            self._settle_earlier_turns()
            self._read([*before, *said], settle=not self.messages or len(said) > self.chunk)
            reply = self._reply(after, room, on_text, options)
        start = seen + len(before)
        user = Message(role="user", text=text, span=Span(start, start + len(said)), offsets=tuple(offsets))
        self.messages += (user, self._spoken(reply, length))
        return self.messages[-1].text

    def erase(self, *, message: int | None = None, text: str | None = None, span: Span | None = None) -> EraseReport:
        """Take a message, a passage, or tokens out of the conversation.

        Args:
            message: Number of a message, from 0; negative ones count from the end.
            text: A passage that occurs once in all messages.
            span: Positions in the cache.

        Raises:
            InputError: Not exactly one of the three, no such message or passage, or it is gone already.
            CacheError: The eraser cannot serve this cache.
        """
        if sum(one is not None for one in (message, text, span)) != 1:
            raise InputError("give exactly one of message=, text= and span=")
        if message is not None:
            span = self._message_span(message)
        elif text is not None:
            span = self._passage_span(text)
        assert span is not None
        fed = max(self.cache.seen, default=0)
        waits = fed < span.end <= fed + len(self._pending)  # a reply's last token, which then is never fed
        in_cache = Span(span.start, fed) if waits else span
        pending = torch.tensor([self._pending], dtype=torch.long).view(1, -1)
        ids = torch.cat([self.cache.ids, pending], 1)
        done = erase(self.cache, in_cache, self.eraser, model=self.model, input_ids=ids)
        self._pending = [] if waits else self._pending
        closing = PositionMap((span,)) if self.eraser.renumbers else None
        self.messages = tuple(_without(one, span, closing) for one in self.messages)
        return done.report

    def report(self) -> Report:
        """Return what the cache holds and costs."""
        return self.cache.report()

    def fork(self) -> "Session":
        """Return a conversation that goes on by itself from here, sharing no storage."""
        twin = object.__new__(Session)
        vars(twin).update(vars(self))
        twin.cache, twin._pending = self.cache.fork(), list(self._pending)
        return twin

    def save(self, path: str | Path) -> None:
        """Write the conversation to a new folder: safetensors and JSON, complete or not at all.

        Raises:
            InputError: The folder exists and is not empty, or cannot be written.
        """
        books = {
            "format": FORMAT,
            "messages": [asdict(one) for one in self.messages],
            "pending": self._pending,
            "system": self.turns.system,
            "chunk": self.chunk,
        }
        with new_folder(Path(path), "the conversation") as work:
            (work / _CACHE).mkdir()
            serialization.write(self.cache.state, self.cache.layers, work / _CACHE)
            (work / _BOOKS).write_text(json.dumps(books, indent=1) + "\n")

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eraser: Eraser | None = None,
    ) -> "Session":
        """Read a conversation that was saved with the same model.

        Raises:
            CacheFileError: Missing, damaged, or made with another model.
        """
        path = Path(path)
        cache = KVCache.load(path / _CACHE, model)
        try:
            books = json.loads((path / _BOOKS).read_text())
            if books["format"] != FORMAT:
                raise CacheFileError(f"{path} has format {books['format']}, this version of vestige reads {FORMAT}")
            session = cls(
                model, tokenizer, cache.policy, cache.memory, eraser, system=books["system"], chunk=books["chunk"]
            )
            session.messages = tuple(map(_message, books["messages"]))
            session._pending = [int(token) for token in books["pending"]]
        except CacheFileError:
            raise
        except Exception as error:
            raise CacheFileError(f"{path} is damaged: {_BOOKS}: {type(error).__name__}: {error}") from None
        session.cache = cache
        return session

    @contextmanager
    def _taken_back_on_error(self) -> Iterator[None]:
        seen, schedule = max(self.cache.seen, default=0), replace(self.cache.state.schedule)
        try:
            yield
        except BaseException:
            with suppress(CacheError):  # layers of other kinds cannot take back a forward that died midway
                self.cache.crop(seen - max(self.cache.seen, default=0))
                self.cache.state.schedule.restore(schedule)  # this was no speculation, which later turns would pay for
            raise

    def _between(self) -> list[int]:
        """Return what stands between the last reply and the next message, without an end mark that was said."""
        ids = self.turns.next_opening()
        last = self.cache.ids[0, -1] if self.cache.ids.numel() else -1
        return ids[1:] if ids and not self._pending and int(last) == ids[0] else ids

    def _settle_earlier_turns(self) -> None:
        """Make room if so much was said since the last settle as may be generated between two."""
        if self.cache.state.schedule.unsettled >= self.cache.policy.every:
            self.cache.settle()

    def _read(self, ids: list[int], settle: bool) -> None:
        batch = torch.tensor([ids], device=self.model.device)
        prefill(self.model, batch, self.cache, chunk=self.chunk, settle=settle)

    def _reply(
        self, after: list[int], room: int, on_text: Callable[[str], None] | None, options: dict[str, Any]
    ) -> list[int]:
        """Generate behind what asks for a reply; return its ids."""
        ids = torch.cat([self.cache.ids, torch.tensor([after])], 1).to(self.model.device)
        tokenizer, generator = self.turns.tokenizer, self.model
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        out: Any = generator.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(self.cache),
            max_new_tokens=room,
            pad_token_id=pad,
            streamer=None if on_text is None else _Streamer(self.turns, on_text),
            **({"do_sample": False} | options),
        )
        new: list[int] = out[0, ids.shape[1] :].tolist()
        return new

    def _spoken(self, reply: list[int], start: int) -> Message:
        """Return a reply as a message; its last token is fed with the next turn, unless it is an end mark."""
        fed = self.cache.seen[0] - start
        text = self.turns.text(reply)
        words = len(reply)
        while words and not self.turns.text(reply[words - 1 : words]):  # end marks are no words
            words -= 1
        ended = words < len(reply)
        self._pending = [] if ended else reply[fed:]
        end = start + words
        span = Span(start, end) if words else None
        return Message(role="assistant", text=text, span=span, offsets=tuple(self.turns.reply_offsets(reply[:words])))

    def _message_span(self, number: int) -> Span:
        if not -len(self.messages) <= number < len(self.messages):
            raise InputError(f"there is no message {number}; the conversation has {len(self.messages)}, from 0")
        span = self.messages[number].span
        if span is None:
            raise InputError(f"message {number} was taken out already, or is empty")
        return span

    def _passage_span(self, text: str) -> Span:
        part = text.strip()
        found = [(number, one) for number, one in enumerate(self.messages) if part and part in one.text]
        if len(found) != 1:
            where = ", ".join(f"message {number}" for number, _ in found) or "no message"
            raise InputError(f"the passage {part[:40]!r} is in {where}; it must be in one")
        _, one = found[0]
        if one.span is None:
            raise InputError("this message was taken out already")
        inside = locate.find(one.text, text, one.offsets)
        return Span(one.span.start + inside.start, one.span.start + inside.end)


class _Streamer(BaseStreamer):
    """Hands on what a reply says beyond what it said before, whole characters only."""

    def __init__(self, turns: Turns, on_text: Callable[[str], None]) -> None:
        self.turns, self.on_text = turns, on_text
        self.ids: list[int] = []
        self.said, self.prompt = "", True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then token by token."""
        if self.prompt:
            self.prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self.turns.text(self.ids)
        if text.endswith("�"):  # half a character
            return
        self.on_text(text[len(self.said) :])
        self.said = text

    def end(self) -> None:
        """Say what is left, whole or not."""
        text = self.turns.text(self.ids)
        if len(text) > len(self.said):
            self.on_text(text[len(self.said) :])


def _without(message: Message, span: Span, closing: PositionMap | None) -> Message:
    """Return a message after a span went: where it stands now, and which of its characters are gone.

    Args:
        message: Before.
        span: What went.
        closing: Where the rest went; None if positions stayed.
    """
    own = message.span
    if own is None:
        return message
    start, end = max(span.start, own.start), min(span.end, own.end)
    gone = range(start - own.start, end - own.start) if start < end else range(0)
    erased = message.erased
    if len(gone) and len(message.offsets) >= gone.stop:
        erased = tuple(sorted((*erased, (message.offsets[gone.start][0], message.offsets[gone.stop - 1][1]))))
    if closing is None:
        return replace(message, erased=erased)
    offsets = tuple(pair for i, pair in enumerate(message.offsets) if i not in gone)
    return replace(message, span=closing(own), offsets=offsets, erased=erased)


def _message(saved: dict[str, Any]) -> Message:
    offsets, erased = (tuple((int(a), int(b)) for a, b in saved[name]) for name in ("offsets", "erased"))
    span = Span(**saved["span"]) if saved["span"] else None
    return Message(role=saved["role"], text=saved["text"], span=span, offsets=offsets, erased=erased)
