"""Keep everything in the heads that retrieve, and first and recent tokens in the others."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.errors import InputError, PolicyError
from vestige.policies.base import Policy
from vestige.policies.observation import Observation, Row, observed_attention
from vestige.policies.selection import RowIndex


@dataclass(frozen=True, kw_only=True)
class DuoAttention(Policy):
    """Let as many retrieval heads keep all their pairs as the room pays for, and the others first and recent ones.

    Every head may have ``first`` + ``recent`` pairs. What that leaves goes to the best retrieval head until it keeps
    all, then to the next: one head at most is in between. Which heads retrieve is given (:func:`read_pattern` reads
    what the authors published) or else measured: the attention that the latest queries pay to pairs that are neither
    among the first nor the recent ones, which a streaming head would lose.

    Source: DuoAttention, arXiv 2410.10819. Differs: the authors find retrieval heads once per model, by training a gate
    per head on synthetic texts; what is measured here is our stand-in, made anew from each text, and untested against
    theirs. The share of retrieval heads follows from the budget, where they choose it. Where the room does not
    even pay for ``first`` + ``recent`` everywhere, all heads stream, with first and recent tokens cut in proportion.
    """

    retrieval: tuple[tuple[float, ...], ...] | None = None
    """How much of a retrieval head each KV head is, by layer of the model; larger means more. None measures it."""
    first: int = 128
    """First tokens that a streaming head wants to keep."""
    recent: int = 256
    """Latest tokens that a streaming head wants to keep."""
    observed: int = 32
    """Latest queries whose attention is measured; 1 is enough where ``retrieval`` is given."""
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("first", 0), ("recent", 1), ("observed", 1)):
            if getattr(self, name) < least:
                raise PolicyError(f"{name} must be at least {least}, got {getattr(self, name)}")
        given = [x for layer in self.retrieval or () for x in layer]
        wrong = [x for x in given if not 0 <= x < float("inf")]
        if self.retrieval is not None and (wrong or not given):
            raise PolicyError(
                f"retrieval needs a finite number of at least 0 for each KV head of each layer, got "
                f"{wrong[0] if wrong else self.retrieval!r}; duo_attention.read_pattern(folder) reads published ones"
            )

    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return 1 + how much of a retrieval head the pair's head is, divided by 1 + how far off the pair is.

        It is 0 off at the first and at the latest token, 1 where a streaming head ends. The best pair of a row tells
        what its head is: the latest token is there whenever room is made.
        """
        scores = torch.empty(len(seen.positions), device=seen.keys.device)
        for row in seen.rows():
            at = seen.positions[row.pairs].float()
            off = (seen.seen[row.batch] - 1 - at) / self.recent
            if self.first:
                off = torch.where(at < self.first, torch.minimum(off, at / self.first), off)
            scores[row.pairs] = (1 + self._retrieval(seen, row)) / (1 + off)
        return scores

    def allot(
        self, scores: Float[Tensor, " held"], grid: RowIndex, room: Int[Tensor, " batch"]
    ) -> Float[Tensor, " rows"]:
        """Return what a streaming head wants, and of what that leaves all that the best heads have, best first."""
        best = scores.new_zeros(len(grid.lengths)).scatter_reduce(0, grid.row, scores, "amax")
        wanted = grid.lengths.clamp_max(self.first + self.recent)
        for b, average in enumerate(room.tolist()):
            rows = (grid.batch == b).nonzero()[:, 0]
            rows = rows[torch.argsort(best[rows], descending=True, stable=True)]
            spare, more = average * len(rows) - int(wanted[rows].sum()), (grid.lengths - wanted)[rows]
            wanted[rows] += torch.minimum(more, (spare - more.cumsum(0) + more).clamp_min(0))
        return wanted.float()

    def _retrieval(self, seen: Observation, row: Row) -> float:
        """Return how much of a retrieval head a row's head is."""
        if self.retrieval is None:
            return self._measured(seen, row)
        layers, heads = len(self.retrieval), {len(layer) for layer in self.retrieval}
        if seen.layer_idx >= layers or len(self.retrieval[seen.layer_idx]) != seen.kv_heads:
            raise PolicyError(
                f"retrieval is for {layers} layers of {sorted(heads)} KV heads, "
                f"but layer {seen.layer_idx} has {seen.kv_heads}; it was made for another model"
            )
        return self.retrieval[seen.layer_idx][row.kv_head]

    def _measured(self, seen: Observation, row: Row) -> float:
        """Return the attention that the latest queries pay beyond what a streaming head holds, between 0 and 1."""
        attention, first = observed_attention(seen, row, self.observed)
        at = seen.positions[row.pairs]
        queries = torch.arange(first, first + attention.shape[1], device=at.device)
        beyond = (at >= self.first) & (at <= queries[:, None] - self.recent)
        return float((attention * beyond).sum(-1).mean())


def read_pattern(folder: str | Path) -> tuple[tuple[float, ...], ...]:
    """Return ``retrieval`` from what the authors publish: ``full_attention_heads.tsv``, a line of numbers per layer.

    Numbers are held to [0, 1], as the authors do.

    Args:
        folder: The folder of one model, or the file itself.

    Raises:
        InputError: It is missing or is not such a table.
    """
    path = Path(folder)
    path = path / "full_attention_heads.tsv" if path.is_dir() else path
    try:
        lines = path.read_text().split("\n")
        table = [tuple(min(max(float(x), 0.0), 1.0) for x in line.split("\t")) for line in lines if line.strip()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not a table of numbers separated by tabs: {error}") from None
    if len({len(layer) for layer in table}) != 1:
        raise InputError(f"{path} needs as many numbers in each line, got {[len(layer) for layer in table]}")
    return tuple(table)
