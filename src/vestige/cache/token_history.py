"""The token ids fed to a cache, with pads, and checks that the next input continues them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from vestige.errors import CacheError


@dataclass
class TokenHistory:
    """Ids and pads of all forwards, stored in pieces so that a decode step copies nothing."""

    _pieces: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    stale: Int[Tensor, "batch removed"] | None = None
    """After a removal of n ids, the last n ids: the start of the input if the caller still uses the old prompt."""

    @property
    def ids(self) -> Int[Tensor, "batch padded_seen"]:
        """Token ids, pads included; -1 where the model got embeddings."""
        return self._whole()[0]

    @property
    def real(self) -> Bool[Tensor, "batch padded_seen"]:
        """False for pads."""
        return self._whole()[1]

    def add(self, ids: Int[Tensor, "batch new"] | None, real: Bool[Tensor, "batch new"]) -> None:
        """Record one forward; ids are None if the model got embeddings."""
        self._pieces.append((torch.full(real.shape, -1) if ids is None else ids.detach().cpu().clone(), real.cpu()))

    def check(self, ids: Int[Tensor, "batch new"] | None) -> None:
        """Raise a CacheError if the first forward after a removal of ids continues the old prompt."""
        stale, self.stale = self.stale, None
        if stale is None or ids is None or ids.shape[1] < stale.shape[1]:
            return
        if torch.equal(ids[:, : stale.shape[1]].detach().cpu(), stale):
            self.stale = stale
            raise CacheError(
                f"this is the prompt from before {stale.shape[1]} of its tokens were erased; feed the ids that "
                "vestige.erase returned (Erased.input_ids) and what follows them"
            )

    def mark_stale(self, ids: Int[Tensor, "batch removed"] | None) -> None:
        """Refuse the next forward if it begins with these ids, the end of the prompt before an erase."""
        self.stale = ids

    @classmethod
    def join(cls, histories: Sequence["TokenHistory"]) -> "TokenHistory":
        """Return the batch rows of several histories as one, shorter ones padded at the left."""
        longest = max(history.ids.shape[1] for history in histories)
        ids = torch.cat([pad(history.ids, (longest - history.ids.shape[1], 0)) for history in histories])
        real = torch.cat([pad(history.real, (longest - history.real.shape[1], 0)) for history in histories])
        return cls([(ids, real)])

    def select(self, kept: Bool[Tensor, "batch padded_seen"]) -> None:
        """Remove the ids that are not marked; each batch row must lose the same number."""
        ids, real = self._whole()
        batch, removed = len(ids), int((~kept[0]).sum())
        self.stale = ids[:, ids.shape[1] - removed :] if removed else None
        self._pieces = [(ids[kept].view(batch, -1), real[kept].view(batch, -1))]

    def crop(self, tokens_to_remove: int) -> list[int]:
        """Remove the last ``-tokens_to_remove`` tokens; return the number in each batch row that are not pads."""
        ids, real = self._whole()
        self._pieces = [(ids[:, :tokens_to_remove], real[:, :tokens_to_remove])]
        removed: list[int] = real[:, tokens_to_remove:].sum(1).tolist()
        return removed

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Keep the given batch rows in the given order."""
        if self._pieces:
            ids, real = self._whole()
            self._pieces = [(ids[rows.cpu()], real[rows.cpu()])]

    def copy(self) -> "TokenHistory":
        """Return an equal history; it shares the pieces, which never change."""
        return TokenHistory(list(self._pieces), self.stale)

    def _whole(self) -> tuple[Tensor, Tensor]:
        if not self._pieces:
            return torch.empty(0, 0, dtype=torch.long), torch.empty(0, 0, dtype=torch.bool)
        if len(self._pieces) > 1:
            ids, real = zip(*self._pieces, strict=True)
            self._pieces = [(torch.cat(ids, 1), torch.cat(real, 1))]
        return self._pieces[0]


def check_positions(
    seen: tuple[int, ...],
    positions: Int[Tensor, "some_batch new"] | None,
    valid: Bool[Tensor, "batch new"] | None,
) -> None:
    """Raise a CacheError unless each batch row's first new token continues the row.

    Args:
        seen: Tokens of each batch row.
        positions: Positions of the new tokens (one row may serve all), or None if the model counts them itself.
        valid: False for pads, or None if there are none.
    """
    if positions is None:
        if valid is not None or len(set(seen)) > 1:
            raise CacheError("batch rows with pads need position_ids (generate and vestige.prefill pass them)")
        return
    for b, expected in enumerate(seen):
        row = positions[min(b, len(positions) - 1)]
        first = 0 if valid is None else int(valid[b].int().argmax())
        if (valid is None or bool(valid[b].any())) and int(row[first]) != expected:
            raise CacheError(
                f"the input begins at position {int(row[first])}, but the cache has seen {expected} tokens of batch "
                f"row {b}; feed what follows the cache (vestige.prefill reads it in chunks), or begin a new one"
            )
