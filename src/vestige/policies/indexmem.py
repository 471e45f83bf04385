"""Keep what a trained indexer says later queries will ask for."""

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
_MOST = 6e4  # float16 holds it


@dataclass(frozen=True, kw_only=True)
class IndexMem(Policy):
    """Keep the pairs that queries asked for most, as a small trained indexer sees it.

    The indexer compares few small index queries with one index key per token and layer. A pair's importance is the
    most that any query since the last eviction asked for it; while a text is read, any query of the text. It is
    gathered in blocks while queries pass. The index key lies beside the pairs, each KV head's row holding a part of it.
    What comes out is the log of a pair's share in all that a row's pairs are asked for, plus the log of how large the
    head's output is, so that with ``share="model"`` all layers and heads compete; within a row neither changes the
    order.

    Source: IndexMem, arXiv 2605.25475: one score per layer, equal counts (``share="head"``), 4 sinks, ``every=128``.
    Differs: the window is protected; the index heads and their sizes are the weights'. Ours, if the weights are made
    so: scores of each KV head apart. Weights: ``vestige train indexmem``. What tokens asked for that were later taken
    back (speculative decoding) stays counted.
    """

    indexer: str | Indexer | None = None
    """A folder, a hub id, or an indexer at hand; None takes the one that is shipped for the model."""
    reduction: Literal["max", "mean"] = "max"
    """Over queries. The mean is over all that saw a pair, however long ago."""
    reuse: int = 1
    """Neighbouring layers that keep what the first of them does, which alone has an index."""
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
        """Read the indexer, or look at the one at hand.

        Raises:
            ModelError: There is none, it is damaged, or another model's.
            PolicyError: All heads of a layer have one score, and are to compete with each other.
        """
        if not self.weights_for(model).config.apart and self.share != "head":
            raise PolicyError(
                f"this indexer has one score for all heads of a layer, so share={self.share!r} has nothing to decide; "
                "use share='head', or one trained with scores apart"
            )

    def weights_for(self, model: PreTrainedModel) -> Indexer:
        """Return the indexer for a model.

        Raises:
            ModelError: As :meth:`bind`.
        """
        return _SHELF.refresh(self.indexer, model)

    def annotate(self, written: NewPairs) -> Mapping[str, Tensor]:
        """Return each row's part of the index keys, and that nobody asked yet; nothing where another layer leads."""
        assert written.hidden is not None and written.model is not None, "the cache shows both"
        indexer, shape = _SHELF.get(self.indexer, written.model), written.keys.shape[:3]
        if indexer.leader(written.layer_idx, self.reuse) != written.layer_idx:
            return {name: written.keys.new_empty(*shape, 0) for name in self.annotations}
        keys = indexer.at(written.layer_idx).index_keys(written.hidden)  # (batch, groups, new, size)
        parts = keys.transpose(1, 2).flatten(2).unflatten(2, (shape[1], -1)).transpose(1, 2)
        device = written.keys.device
        if self.reduction == "mean":
            nobody = torch.zeros(*shape, 1, device=device)
        else:
            nobody = torch.full((*shape, 2), -torch.inf, dtype=torch.float16, device=device)
        return {"index_key": parts.to(written.keys.dtype), "asked_for": nobody}

    def watch_layer(self, glance: LayerView) -> None:
        """Write down what new queries ask for."""
        indexer = _SHELF.get(self.indexer, glance.model)
        if indexer.leader(glance.layer_idx, self.reuse) != glance.layer_idx:
            return
        assert glance.hidden is not None, "the cache shows it"
        asking = indexer.at(glance.layer_idx).index_queries(glance.hidden)
        if len(glance.at) == 1:  # it sees every pair
            self._note(glance.slots["asked_for"], _asked_at_once(asking, glance, indexer.config.apart))
            return
        rows = [(row.annotations["index_key"], row.annotations["asked_for"], row.positions) for row in glance.rows]
        if indexer.config.apart:
            for group, (keys, notes, positions) in enumerate(rows):
                own = IndexQueries(asking.queries[group : group + 1], asking.gates[group : group + 1])
                found = self._found(own, keys[None], glance.at, positions)
                self._note(notes, found[0])
            return
        _require_alike([positions for _, _, positions in rows])
        keys = torch.cat([part for part, _, _ in rows], -1)
        found = self._found(asking, keys[None], glance.at, rows[0][2])
        for _, notes, _ in rows:
            self._note(notes, found[0])

    def renew(self, annotations: Mapping[str, Tensor]) -> None:
        """Put what was asked for since the last eviction in second place; queries to come take the first."""
        if self.reduction == "max" and (notes := annotations["asked_for"]).shape[1]:
            latest = notes[:, 0]
            notes[:, 1] = torch.where(latest == -torch.inf, notes[:, 1], latest)
            notes[:, 0] = -torch.inf

    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return log shares of what is asked for, plus the log of the head's scale; the leader's, if there is one."""
        assert seen.model is not None, "the cache shows it"
        indexer = _SHELF.get(self.indexer, seen.model)
        leader = indexer.leader(seen.layer_idx, self.reuse)
        if leader != seen.layer_idx:
            if seen.earlier[leader].shape != seen.positions.shape:
                raise PolicyError(
                    "with reuse neighbouring layers must hold the same tokens, but another policy evicted"
                )
            return seen.earlier[leader]
        if not indexer.config.apart:
            for b in range(len(seen.seen)):
                _require_alike([seen.positions[row.pairs] for row in seen.rows() if row.batch == b])
        scores, scales = torch.empty(len(seen.positions), device=seen.keys.device), indexer.log_scale(seen.layer_idx)
        for row in seen.rows():
            worth = self._worth(seen, row.pairs, seen.seen[row.batch])
            counted = worth[seen.positions[row.pairs] >= self.sink]  # sinks took no part in training
            whole = (counted if len(counted) else worth).logsumexp(0)
            scores[row.pairs] = worth - whole + scales[row.kv_head]
        return scores

    def _found(self, asking: IndexQueries, keys: Tensor, at: Tensor, positions: Tensor) -> Tensor:
        compared = Comparison(asking, keys.float(), at, positions)
        return compared.total() if self.reduction == "mean" else compared.max()

    def _note(self, notes: Float[Tensor, "held _kinds"], found: Float[Tensor, " held"]) -> None:
        if self.reduction == "mean":
            notes[:, 0] += found
        else:
            notes[:, 0] = torch.maximum(notes[:, 0], found.clamp(max=_MOST).to(notes.dtype))

    def _worth(self, seen: Observation, pairs: slice, end: int) -> Float[Tensor, " row_held"]:
        notes = seen.annotations["asked_for"][pairs].float()
        if self.reduction == "mean":
            return notes[:, 0] / (end - seen.positions[pairs]).clamp_min(1)
        return torch.where(notes[:, 0] == -torch.inf, notes[:, 1], notes[:, 0]).clamp_min(-_MOST)


def _asked_at_once(asking: IndexQueries, glance: LayerView, apart: bool) -> Float[Tensor, " slots"]:
    """Return how much one token asks for each slot, of all rows in a few operations."""
    keys = glance.slots["index_key"].float()
    if apart:
        queries, gates = (x[:, :, 0][glance.heads] for x in (asking.queries, asking.gates))
        return ((queries * keys[:, None]).sum(-1).relu_() * gates).sum(1)
    rows = int(glance.heads[-1]) + 1
    if len(keys) % rows:
        raise PolicyError(_UNLIKE)
    whole = keys.view(rows, -1, keys.shape[1]).transpose(0, 1).flatten(1)  # the rows of a layer hold the same tokens
    return index_scores(asking, whole[None])[0, 0].repeat(rows)


def _require_alike(rows: Sequence[Int[Tensor, " _held"]]) -> None:
    """Raise a PolicyError unless all heads of a layer, in one batch row, hold the same tokens."""
    if not all(torch.equal(row, rows[0]) for row in rows):
        raise PolicyError(_UNLIKE)


_UNLIKE = (
    "this indexer has one score for all heads of a layer, which must hold the same tokens, but another policy has "
    "evicted pairs of each head; use an indexer trained with scores apart"
)
_SHELF = WeightsCache("indexmem", Indexer.load)
