"""DuoAttention: all pairs in retrieval heads, first and recent tokens in the others."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.errors import InputError, PolicyError
from vestige.policies.base import Policy
from vestige.policies.observation import Observation, Row
from vestige.policies.scoring import compute_observed_attention
from vestige.policies.selection import RowIndex


@dataclass(frozen=True, kw_only=True)
class DuoAttention(Policy):
    """Let as many retrieval heads keep all their pairs as the room pays for, and the others first and recent ones.

    Every head may have ``first`` + ``recent`` pairs. The rest of the budget goes to the best retrieval head until it
    keeps all its pairs, then to the next, so that at most one head is in between. ``retrieval`` ranks the heads
    (:func:`read_pattern` reads the authors' files). Without it heads are ranked by the attention that the latest
    queries pay to the pairs that a streaming head would lose, those neither first nor recent.

    Source: DuoAttention, arXiv 2410.10819. Differs: the authors find retrieval heads once per model, by training a gate
    per head on synthetic texts; the measurement here is our substitute, repeated for each text and untested against
    theirs. The share of retrieval heads follows from the budget, where they choose it. If the budget does not suffice
    for ``first`` + ``recent`` everywhere, all heads stream, with first and recent tokens cut in proportion.
    """

    retrieval: tuple[tuple[float, ...], ...] | None = None
    """Retrieval score of each KV head, by layer of the model; larger means more. None measures it."""
    first: int = 128
    """First tokens of a streaming head."""
    recent: int = 256
    """Latest tokens of a streaming head."""
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

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return ``(1 + retrieval score of the head) / (1 + distance of the pair)``.

        The distance is 0 at the first and at the latest token, 1 at the limits of a streaming head. The row's maximum
        thus gives the retrieval score of its head: the latest token is held at every eviction.
        """
        scores = torch.empty(len(obs.positions), device=obs.keys.device)
        for row in obs.rows():
            at = obs.positions[row.pairs].float()
            off = (obs.seen[row.batch] - 1 - at) / self.recent
            if self.first:
                off = torch.where(at < self.first, torch.minimum(off, at / self.first), off)
            scores[row.pairs] = (1 + self._find_retrieval(obs, row)) / (1 + off)
        return scores

    def allot(
        self, scores: Float[Tensor, " held"], index: RowIndex, pair_limits: Int[Tensor, " batch"]
    ) -> Float[Tensor, " rows"]:
        """Return the pairs of a streaming head for each row, and all pairs for the best heads as the budget allows."""
        best = scores.new_zeros(len(index.lengths)).scatter_reduce(0, index.row, scores, "amax")
        wanted = index.lengths.clamp_max(self.first + self.recent)
        for b, average in enumerate(pair_limits.tolist()):
            rows = (index.batch == b).nonzero()[:, 0]
            rows = rows[torch.argsort(best[rows], descending=True, stable=True)]
            spare, more = average * len(rows) - int(wanted[rows].sum()), (index.lengths - wanted)[rows]
            wanted[rows] += torch.minimum(more, (spare - more.cumsum(0) + more).clamp_min(0))
        return wanted.float()

    def _find_retrieval(self, obs: Observation, row: Row) -> float:
        if self.retrieval is None:
            return self._measure_retrieval(obs, row)
        layers, heads = len(self.retrieval), {len(layer) for layer in self.retrieval}
        if obs.layer_idx >= layers or len(self.retrieval[obs.layer_idx]) != obs.kv_heads:
            raise PolicyError(
                f"retrieval is for {layers} layers of {sorted(heads)} KV heads, "
                f"but layer {obs.layer_idx} has {obs.kv_heads}; it was made for another model"
            )
        return self.retrieval[obs.layer_idx][row.kv_head]

    def _measure_retrieval(self, obs: Observation, row: Row) -> float:
        """Return the share of the latest queries' attention to pairs that a streaming head would not hold."""
        attention, first = compute_observed_attention(obs, row, self.observed)
        at = obs.positions[row.pairs]
        queries = torch.arange(first, first + attention.shape[1], device=at.device)
        beyond = (at >= self.first) & (at <= queries[:, None] - self.recent)
        return float((attention * beyond).sum(-1).mean())


def read_pattern(folder: str | Path) -> tuple[tuple[float, ...], ...]:
    """Return ``retrieval`` from the authors' ``full_attention_heads.tsv``, a line of numbers per layer.

    Numbers are clamped to [0, 1], as the authors do.

    Args:
        folder: The folder of one model, or the file itself.

    Raises:
        InputError: The file is missing or is not such a table.
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
