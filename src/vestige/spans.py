"""Half-open ranges of positions of the original sequence."""

from dataclasses import dataclass

from vestige.errors import InputError


@dataclass(frozen=True, order=True)
class Span:
    """Positions ``[start, end)``, counted in tokens as seen, pads left out.

    Raises:
        InputError: The range is empty or begins before 0.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise InputError(f"a span needs 0 <= start < end, got [{self.start}, {self.end})")

    def __len__(self) -> int:
        return self.end - self.start
