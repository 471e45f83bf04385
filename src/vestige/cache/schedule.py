"""When room is made: the clock of settles."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Schedule:
    """Counts tokens since the last settle and says when one is due.

    Pieces of text come in forwards of many tokens, generated ones singly. A prompt is settled before its first
    one-token forward, unless the cache was filled by ``vestige.prefill``: then a piece of at most ``chunk`` tokens is a
    question and stays whole until ``every`` tokens were generated. Speculative decoding feeds several candidates at
    once and takes some back: once that was seen, all tokens count as generated.
    """

    chunk: int = 1024
    prompt: int = 0
    generated: int = 0
    prefilled: bool = False
    speculative: bool = False
    reading: bool = False
    """True inside ``vestige.prefill``, which settles between chunks itself."""

    def is_due(self, new: int, every: int) -> bool:
        """Return whether to settle before a forward of ``new`` tokens."""
        if self.reading:
            return False
        if self.speculative or self.generated >= every:
            return self.prompt + self.generated >= every
        if new > 1:
            return self.prompt >= self.chunk  # a long prompt in pieces that no prefill manages
        return self.prompt > (self.chunk if self.prefilled else 0)

    def count(self, new: int) -> None:
        """Count a forward."""
        if new > 1:
            self.prompt += new
        else:
            self.generated += 1

    def take_back(self, tokens: int) -> None:
        """Count tokens that were cropped off again, latest first."""
        self.speculative = True
        back = min(tokens, self.prompt)
        self.prompt -= back
        self.generated = max(self.generated - (tokens - back), 0)

    def reset(self) -> None:
        """Start counting anew."""
        self.prompt = self.generated = 0

    @property
    def unsettled(self) -> int:
        """Tokens since the last settle."""
        return self.prompt + self.generated

    @contextmanager
    def reading_chunks(self, chunk: int) -> Iterator[None]:
        """Inside, a prefill settles between chunks, and forwards do not."""
        outer, self.reading, self.chunk = self.reading, True, chunk
        try:
            yield
        finally:
            self.reading = outer

    def allow_question(self, tokens: int) -> None:
        """Let pieces of up to ``tokens`` tokens stay whole."""
        self.chunk = tokens

    def restore(self, earlier: "Schedule") -> None:
        """Count as an earlier copy of this schedule did."""
        vars(self).update(vars(earlier))
