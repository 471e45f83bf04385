"""IndexMem: importance from a small trained indexer that compares index queries with index keys."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vestige.errors import PolicyError, require_whole, unknown_name_message
from vestige.nn.indexer import Comparison, Indexer, IndexQueries, index_scores
from vestige.nn.pretrained import WeightsCache
from vestige.policies.base import NewPairs, Policy
from vestige.policies.observation import LayerView, Observation

REDUCTIONS = ("max", "mean")
_MAX_SCORE = 6e4  # float16 holds it


@dataclass(frozen=True, kw_only=True)
class IndexMem(Policy):
    """Keep the pairs that queries asked for most, as a small trained indexer sees it.

    The indexer compares few small index queries with one index key per token and layer. A pair's importance is its
    highest index score over all queries since the last eviction, or over all queries of a text while it is read; it is
    accumulated in blocks as queries arrive. The index key is stored beside the pairs, each KV head's row holding a part
    of it. The score is the log of a pair's share of its row's importance, plus the log scale of the head's output, so
    that with ``share="model"`` all layers and heads compete; within a row neither changes the order.

    Source: IndexMem, arXiv 2605.25475: one score per layer, equal counts (``share="head"``), 4 sinks, ``every=128``.
    Differs: the window is protected; the weights determine the index heads and their sizes. Ours, with weights of that
    kind: separate scores for each KV head. Weights: ``vestige train indexmem``. The index scores of tokens that were
    rolled back later (speculative decoding) stay counted.
    """

    indexer: str | Indexer | None = None
    """A folder, a hub id, or an `Indexer`; None takes the one shipped for the model."""
    reduction: Literal["max", "mean"] = "max"
    """Reduction over queries. The mean is over all queries that saw a pair, not only the latest."""
    reuse: int = 1
    """Number of neighbouring layers that keep the same pairs as the first of them, which alone has an index."""
    every: int = 128
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    annotations: ClassVar[frozenset[str]] = frozenset({"index_key", "asked_for"})
    query_annotations: ClassVar[frozenset[str]] = frozenset({"asked_for"})
    annotation_options: ClassVar[tuple[str, ...]] = ("indexer", "reduction", "reuse")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction not in REDUCTIONS:
            raise PolicyError(unknown_name_message("reduction", str(self.reduction), REDUCTIONS))
        require_whole("reuse", self.reuse, 1)
        if self.reuse > 1 and self.share != "head":
            raise PolicyError("layers that keep the same tokens keep equally many: reuse needs share='head'")

    def bind(self, model: PreTrainedModel) -> None:
        """Load the indexer, or check the one given.

        Raises:
            ModelError: The indexer is missing, damaged, or made for another model.
            PolicyError: The heads of a layer share one score, but ``share`` lets them compete.
        """
        if not self.weights_for(model).config.apart and self.share != "head":
            raise PolicyError(
                f"this indexer has one score for all heads of a layer, so share={self.share!r} has nothing to decide; "
                "use share='head', or one trained with scores apart"
            )

    def weights_for(self, model: PreTrainedModel) -> Indexer:
        """Return the indexer for a model, as :meth:`bind` loads it."""
        return _WEIGHTS.refresh(self.indexer, model)

    def annotate(self, new: NewPairs) -> Mapping[str, Tensor]:
        """Return each row's part of the index keys and empty statistics, of width 0 where another layer leads."""
        assert new.hidden is not None and new.model is not None, "the cache shows both"
        indexer, shape = _WEIGHTS.get(self.indexer, new.model), new.keys.shape[:3]
        if indexer.leader(new.layer_idx, self.reuse) != new.layer_idx:
            return {name: new.keys.new_empty(*shape, 0) for name in self.annotations}
        keys = indexer.at(new.layer_idx).index_keys(new.hidden)  # (batch, groups, new, size)
        parts = keys.transpose(1, 2).flatten(2).unflatten(2, (shape[1], -1)).transpose(1, 2)
        device = new.keys.device
        if self.reduction == "mean":
            nobody = torch.zeros(*shape, 1, device=device)
        else:
            nobody = torch.full((*shape, 2), -torch.inf, dtype=torch.float16, device=device)
        return {"index_key": parts.to(new.keys.dtype), "asked_for": nobody}

    def watch_layer(self, view: LayerView) -> None:
        """Accumulate the index scores of new queries."""
        indexer = _WEIGHTS.get(self.indexer, view.model)
        if indexer.leader(view.layer_idx, self.reuse) != view.layer_idx:
            return
        assert view.hidden is not None, "the cache shows it"
        asking = indexer.at(view.layer_idx).index_queries(view.hidden)
        if len(view.query_positions) == 1:  # it sees every pair
            self._record(view.slots["asked_for"], _score_one_query(asking, view, indexer.config.apart))
            return
        rows = [(row.annotations["index_key"], row.annotations["asked_for"], row.positions) for row in view.rows]
        if indexer.config.apart:
            for group, (keys, notes, positions) in enumerate(rows):
                own = IndexQueries(asking.queries[group : group + 1], asking.gates[group : group + 1])
                found = self._score_keys(own, keys[None], view.query_positions, positions)
                self._record(notes, found[0])
            return
        _require_equal_rows([positions for _, _, positions in rows])
        keys = torch.cat([part for part, _, _ in rows], -1)
        found = self._score_keys(asking, keys[None], view.query_positions, rows[0][2])
        for _, notes, _ in rows:
            self._record(notes, found[0])

    def renew(self, annotations: Mapping[str, Tensor]) -> None:
        """Move the maxima since the last eviction to the second column, and clear the first for new queries."""
        if self.reduction == "max" and (notes := annotations["asked_for"]).shape[1]:
            latest = notes[:, 0]
            notes[:, 1] = torch.where(latest == -torch.inf, notes[:, 1], latest)
            notes[:, 0] = -torch.inf

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return log shares of importance plus the head's log scale; the leader's scores where another layer leads."""
        assert obs.model is not None, "the cache shows it"
        indexer = _WEIGHTS.get(self.indexer, obs.model)
        leader = indexer.leader(obs.layer_idx, self.reuse)
        if leader != obs.layer_idx:
            if obs.earlier[leader].shape != obs.positions.shape:
                raise PolicyError(
                    "with reuse neighbouring layers must hold the same tokens, but another policy evicted"
                )
            return obs.earlier[leader]
        if not indexer.config.apart:
            for b in range(len(obs.seen)):
                _require_equal_rows([obs.positions[row.pairs] for row in obs.rows() if row.batch == b])
        scores, scales = torch.empty(len(obs.positions), device=obs.keys.device), indexer.log_scale(obs.layer_idx)
        for row in obs.rows():
            worth = self._compute_worth(obs, row.pairs, obs.seen[row.batch])
            counted = worth[obs.positions[row.pairs] >= self.sink]  # sinks took no part in training
            whole = (counted if len(counted) else worth).logsumexp(0)
            scores[row.pairs] = worth - whole + scales[row.kv_head]
        return scores

    def _score_keys(self, asking: IndexQueries, keys: Tensor, at: Tensor, positions: Tensor) -> Tensor:
        compared = Comparison(asking, keys.float(), at, positions)
        return compared.total() if self.reduction == "mean" else compared.max()

    def _record(self, notes: Float[Tensor, "held _kinds"], found: Float[Tensor, " held"]) -> None:
        if self.reduction == "mean":
            notes[:, 0] += found
        else:
            notes[:, 0] = torch.maximum(notes[:, 0], found.clamp(max=_MAX_SCORE).to(notes.dtype))

    def _compute_worth(self, obs: Observation, pairs: slice, end: int) -> Float[Tensor, " row_held"]:
        notes = obs.annotations["asked_for"][pairs].float()
        if self.reduction == "mean":
            return notes[:, 0] / (end - obs.positions[pairs]).clamp_min(1)
        return torch.where(notes[:, 0] == -torch.inf, notes[:, 1], notes[:, 0]).clamp_min(-_MAX_SCORE)


def _score_one_query(asking: IndexQueries, view: LayerView, apart: bool) -> Float[Tensor, " slots"]:
    """Return the index scores of one token for the slots of all rows, in a few operations."""
    keys = view.slots["index_key"].float()
    if apart:
        queries, gates = (x[:, :, 0][view.heads] for x in (asking.queries, asking.gates))
        return ((queries * keys[:, None]).sum(-1).relu_() * gates).sum(1)
    rows = int(view.heads[-1]) + 1
    if len(keys) % rows:
        raise PolicyError(_UNEQUAL_ROWS)
    whole = keys.view(rows, -1, keys.shape[1]).transpose(0, 1).flatten(1)  # the rows of a layer hold the same tokens
    return index_scores(asking, whole[None])[0, 0].repeat(rows)


def _require_equal_rows(rows: Sequence[Int[Tensor, " _held"]]) -> None:
    """Raise a PolicyError unless the given rows hold the same tokens."""
    if not all(torch.equal(row, rows[0]) for row in rows):
        raise PolicyError(_UNEQUAL_ROWS)


_UNEQUAL_ROWS = (
    "this indexer has one score for all heads of a layer, which must hold the same tokens, but another policy has "
    "evicted pairs of each head; use an indexer trained with scores apart"
)
_WEIGHTS = WeightsCache("indexmem", Indexer.load)
