"""Budgets: the number of KV pairs that a cache may hold. All rounding is done here."""

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from vestige.errors import BudgetError

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "B": 1.0}
UNLIMITED = 2**40
"""A number of pairs per row that no cache reaches, small enough to be multiplied by rows."""
_HALF_ULP = 1e-9  # 0.29 * 100 is 28.999999999999996, which must stay 29


@dataclass(frozen=True)
class Footprint:
    """The bytes of one batch row of a cache, so that bytes can be converted into pairs.

    Args:
        rows: KV heads summed over the evictable layers.
        pair_bytes: Bytes of one pair in every row: keys, values, position and side arrays, summed over rows.
        fixed_bytes: Bytes that no eviction frees: slack, query rings, memories.
    """

    rows: int
    pair_bytes: int
    fixed_bytes: int = 0


@dataclass(frozen=True)
class Budget:
    """Pairs that a row (one KV head of one layer of one batch row) may hold on average after a settle.

    Protected pairs count. Made by :meth:`tokens`, :meth:`fraction`, :meth:`bytes` or :meth:`parse`; batch rows
    have their own budgets and never compete.
    """

    kind: Literal["tokens", "fraction", "bytes"]
    amount: float | int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.amount) and self.amount > 0):
            raise BudgetError(f"a budget must be a positive number, got {self.amount!r}")
        if self.kind == "fraction" and self.amount > 1:
            raise BudgetError(
                f"a fraction must lie in (0, 1], got {self.amount!r}; for tokens write a number without a point"
            )
        if self.kind == "tokens" and self.amount != int(self.amount):
            raise BudgetError(f"tokens must be a whole number, got {self.amount!r}")

    @classmethod
    def tokens(cls, n: int) -> "Budget":
        """Return a budget of ``n`` pairs per row on average."""
        return cls("tokens", n)

    @classmethod
    def fraction(cls, f: float) -> "Budget":
        """Return a budget of a share ``f`` in (0, 1] of the announced length, or else of the tokens seen so far."""
        return cls("fraction", f)

    @classmethod
    def bytes(cls, b: float | int) -> "Budget":
        """Return a budget of the pairs that fit into ``b`` bytes beside slack, side arrays and memories."""
        return cls("bytes", b)

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read ``512`` (tokens), ``0.1`` (with a point: a fraction) or ``64MB`` (bytes).

        Raises:
            BudgetError: The text is none of the three, or out of range.
        """
        word = text.strip()
        try:
            for unit, size in UNITS.items():
                if word.endswith(unit) and word[: -len(unit)].strip()[-1:].isdigit():
                    return cls.bytes(float(word[: -len(unit)]) * size)
            return cls.fraction(float(word)) if "." in word else cls.tokens(int(word))
        except (ValueError, OverflowError) as error:
            if isinstance(error, BudgetError):
                raise
            raise BudgetError(
                f"cannot read budget {text!r}; write tokens (512), a fraction (0.1) or bytes (64MB)"
            ) from None

    def __str__(self) -> str:
        if self.kind == "fraction":
            return f"{Decimal(repr(float(self.amount))):f}"  # 0.00001, which parse can read, not 1e-05
        return f"{int(self.amount)}B" if self.kind == "bytes" else str(int(self.amount))

    def check(self, protected: int, *, length: int | None = None, footprint: Footprint | None = None) -> None:
        """Raise an error if the budget is known to be below the protected pairs.

        Args:
            protected: Pairs of every row that no policy may evict (sink + window).
            length: The announced length, if any, which a fraction refers to.
            footprint: Bytes of a batch row, if known, which convert a budget in bytes.

        Raises:
            BudgetError: The budget is too small; the message gives both numbers.
        """
        if self.kind == "fraction":
            if length is None:
                return
            n, protected = self._floor(self.amount * length), min(protected, length)
        elif self.kind == "bytes":
            if footprint is None:
                return
            n = self._pairs_in_bytes(footprint)
        else:
            n = int(self.amount)
        if n < protected:
            raise BudgetError(f"budget {self} gives {n} pairs a row, but sink and window protect {protected}")

    def pairs(self, *, seen: int, length: int | None, protected: int, footprint: Footprint) -> int:
        """Return the average number of pairs per row after a settle of one batch row.

        Args:
            seen: Tokens of the batch row so far.
            length: The announced length, or None.
            protected: sink + window, the least that a fraction of an unannounced length gives.
            footprint: Bytes of the batch row.
        """
        if self.kind == "tokens":
            return int(self.amount)
        if self.kind == "bytes":
            return self._pairs_in_bytes(footprint)
        if length is None:
            return max(self._floor(self.amount * seen), protected)
        return self._floor(self.amount * length)

    @staticmethod
    def slacken(pairs: int, factor: float) -> int:
        """Return the limit of pairs between chunks, given a policy's ``reading_slack`` as factor; inf is no limit."""
        return UNLIMITED if math.isinf(factor) else Budget._floor(pairs * factor)

    @staticmethod
    def share_of(pairs: int, part: float) -> int:
        """Return a share ``part`` of an average of ``pairs``, rounded down."""
        return Budget._floor(pairs * part)

    def _pairs_in_bytes(self, footprint: Footprint) -> int:
        return max(self._floor((self.amount - footprint.fixed_bytes) / footprint.pair_bytes), 0)

    @staticmethod
    def _floor(x: float) -> int:
        return math.floor(x + _HALF_ULP)
