"""The schedule of settles: it counts tokens and tells when to evict."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Schedule:
    """Counts tokens since the last settle and tells when the next one is due.

    Text arrives in forwards of many tokens, generated tokens arrive one by one. A settle of the prompt is due before
    the first one-token forward. After ``vestige.prefill``, however, a piece of at most ``chunk`` tokens is a question
    and stays whole until ``every`` tokens are generated. Speculative decoding feeds several candidates at once and
    removes some: after the first removal all tokens count as generated.
    """

    chunk: int = 1024
    prompt: int = 0
    generated: int = 0
    prefilled: bool = False
    speculative: bool = False
    reading: bool = False
    """True inside ``vestige.prefill``, which settles between chunks itself."""

    def is_due(self, new: int, every: int) -> bool:
        """Tell whether to settle before a forward of ``new`` tokens."""
        if self.reading:
            return False
        if self.speculative or self.generated >= every:
            return self.prompt + self.generated >= every
        if new > 1:
            return self.prompt >= self.chunk  # a long prompt in pieces, without vestige.prefill
        return self.prompt > (self.chunk if self.prefilled else 0)

    def count(self, new: int) -> None:
        """Count the tokens of a forward."""
        if new > 1:
            self.prompt += new
        else:
            self.generated += 1

    def take_back(self, tokens: int) -> None:
        """Subtract cropped tokens, latest first."""
        self.speculative = True
        from_prompt = min(tokens, self.prompt)
        self.prompt -= from_prompt
        self.generated = max(self.generated - (tokens - from_prompt), 0)

    def reset(self) -> None:
        """Restart the count, after a settle."""
        self.prompt = self.generated = 0

    @property
    def unsettled(self) -> int:
        """Tokens since the last settle."""
        return self.prompt + self.generated

    @contextmanager
    def reading_chunks(self, chunk: int) -> Iterator[None]:
        """Suspend settles before forwards inside: the prefill settles between chunks itself."""
        outer, self.reading, self.chunk = self.reading, True, chunk
        try:
            yield
        finally:
            self.reading = outer

    def allow_question(self, tokens: int) -> None:
        """Keep later pieces of up to ``tokens`` tokens whole."""
        self.chunk = tokens

    def restore(self, earlier: "Schedule") -> None:
        """Restore the counts of an earlier copy of this schedule."""
        vars(self).update(vars(earlier))
