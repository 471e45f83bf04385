"""IndexMem's indexer: small projections that predict which pairs queries will attend to.

Each layer has one index key and few index queries per token, projected from the input of attention. The index score of
a query and a token is a sum over the query's index heads. The importance of a token is its largest index score.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vestige.errors import InputError
from vestige.nn.per_layer import PerLayerConfig, PerLayerModule

QUERY_BLOCK = 256
"""Queries that are compared with all keys at a time, so that no tensor of all queries times all keys is made."""


@dataclass(frozen=True, kw_only=True)
class IndexerConfig(PerLayerConfig):
    """The shape of an indexer, and the model it belongs to.

    Args:
        kv_heads: KV heads of each of these layers.
        hidden: Size of a layer's input.
        heads: Index heads for each KV head.
        dim: Size of each KV head's part of the index key.
        apart: Whether each KV head has scores of its own, from its own index heads and its own part of the key. If
            not, all index heads read the whole key, and a layer has one score for all its KV heads, as in the paper.

    Raises:
        InputError: A number out of range.
    """

    kv_heads: tuple[int, ...]
    hidden: int
    heads: int = 1
    dim: int = 8
    apart: bool = False

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.kv_heads):
            raise InputError("an indexer needs layers, and the KV heads of each")
        if min(self.hidden, self.heads, self.dim, *self.kv_heads) < 1:
            raise InputError("hidden, heads, dim and kv_heads must be at least 1")


@dataclass(frozen=True, eq=False)
class IndexQueries:
    """The index queries of some tokens of a layer. A group is a KV head, or all KV heads where these share scores.

    Args:
        queries: Query of each group and index head.
        gates: Weight of each index head.
    """

    queries: Float[Tensor, "groups heads new size"]
    gates: Float[Tensor, "groups heads new"]


class LayerIndexer(nn.Module):
    """The indexer of one layer.

    Args:
        config: Shape of the whole indexer.
        place: Index of the layer among those of the config.
    """

    def __init__(self, config: IndexerConfig, place: int) -> None:
        super().__init__()
        kv_heads = config.kv_heads[place]
        self.groups = kv_heads if config.apart else 1
        self.size = config.dim if config.apart else config.dim * kv_heads
        index_heads = config.heads * kv_heads
        self.keys = nn.Linear(config.hidden, kv_heads * config.dim, bias=False)
        self.queries = nn.Linear(config.hidden, index_heads * self.size, bias=False)
        self.gates = nn.Linear(config.hidden, index_heads, bias=False)
        self.query_norm, self.key_norm = nn.RMSNorm(self.size), nn.RMSNorm(self.size)

    def index_keys(self, hidden: Float[Tensor, "*batch new hidden"]) -> Float[Tensor, "*batch groups new size"]:
        """Return the index keys of tokens, given the input of attention."""
        keys: Tensor = self.keys(hidden.float())
        normed: Tensor = self.key_norm(keys.unflatten(-1, (self.groups, self.size)))
        return normed.transpose(-2, -3)

    def index_queries(self, hidden: Float[Tensor, "new hidden"]) -> IndexQueries:
        """Return the index queries of tokens, given the input of attention."""
        hidden = hidden.float()
        flat: Tensor = self.queries(hidden)
        queries = self.query_norm(flat.unflatten(-1, (self.groups, -1, self.size))).permute(1, 2, 0, 3)
        gates: Tensor = self.gates(hidden).unflatten(-1, (self.groups, -1)).permute(1, 2, 0)
        return IndexQueries(queries, gates * (gates.shape[1] * self.groups * self.size) ** -0.5)


class Indexer(PerLayerModule[IndexerConfig]):
    """The indexers of all evictable layers.

    Source: IndexMem, arXiv 2605.25475: one key for all index heads, RMSNorm, ReLU, head gates, the maximum over
    queries. Differs: the paper projects the layer's queries before RoPE, which are themselves a projection of the
    input of attention (normed, in some models). Here both are one projection: the same function, and RoPE need not be
    undone for every token. We add scores for each KV head, and ``log_scales``, the log of the size of each KV head's
    output, so that scores of all layers and heads can be compared. The indexer computes in float32, which on a CPU is
    faster than bfloat16 for matrices this small.
    """

    config_class = IndexerConfig
    file_name = title = "indexer"
    log_scales: Tensor

    def __init__(self, config: IndexerConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(LayerIndexer(config, place) for place in range(len(config.layers)))
        self.register_buffer("log_scales", torch.zeros(len(config.layers), max(config.kv_heads)))

    def at(self, layer_idx: int) -> LayerIndexer:
        """Return the indexer of a layer."""
        found = self.layers[self._place[layer_idx]]
        assert isinstance(found, LayerIndexer)
        return found

    def log_scale(self, layer_idx: int) -> Float[Tensor, " kv_heads"]:
        """Return the log of the size of each KV head's output."""
        place = self._place[layer_idx]
        return self.log_scales[place, : self.config.kv_heads[place]]

    def leader(self, layer_idx: int, reuse: int) -> int:
        """Return the first layer of the group of ``reuse`` neighbours that a layer belongs to."""
        return self.config.layers[self._place[layer_idx] // reuse * reuse]


def index_scores(queries: IndexQueries, keys: Float[Tensor, "groups held size"]) -> Float[Tensor, "groups new held"]:
    """Return the index score of each query and key: ReLU of their products, summed over index heads by their gates."""
    products, gates = (queries.queries @ keys[:, None].mT).relu_(), queries.gates[..., None]
    weighed = products * gates if torch.is_grad_enabled() else products.mul_(gates)  # one tensor of queries times keys
    return weighed[:, 0] if weighed.shape[1] == 1 else weighed.sum(1)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Index scores of queries and keys, computed causally in blocks of queries.

    Args:
        queries: Index queries.
        keys: Index keys of one batch row, all groups at the same positions.
        at: Position of each query, ascending.
        positions: Position of each key, ascending except for pads. Pads, at any place, have -1, and no query sees them.
    """

    queries: IndexQueries
    keys: Float[Tensor, "groups held size"]
    at: Int[Tensor, " new"]
    positions: Int[Tensor, " held"]

    def max(self) -> Float[Tensor, "groups held"]:
        """Return the largest score of each key; -inf for a key that no query sees."""
        best = self._per_key(-torch.inf)
        for _, scores in self._blocks():
            end = scores.shape[2]
            best[:, :end] = torch.maximum(best[:, :end], scores.amax(1))
        return best

    def argmax(self) -> Int[Tensor, "groups held"]:
        """Return the index of the query with the largest score of each key; 0 for a key that no query sees."""
        best, winner = self._per_key(-torch.inf), self._per_key(0)
        for block, scores in self._blocks():
            top, index = scores.max(1)
            end = top.shape[1]
            better = top > best[:, :end]
            best[:, :end] = torch.where(better, top, best[:, :end])
            winner[:, :end] = torch.where(better, index + block.start, winner[:, :end])
        return winner

    def total(self) -> Float[Tensor, "groups held"]:
        """Return the sum of each key's scores over all queries that see it."""
        sums = self._per_key(0.0)
        for _, scores in self._blocks():
            sums[:, : scores.shape[2]] += scores.masked_fill_(scores == -torch.inf, 0.0).sum(1)
        return sums

    def _per_key(self, value: float | int) -> Tensor:
        """Return a tensor with a value for each key, in the dtype of the value."""
        return torch.full(self.keys.shape[:2], value, device=self.keys.device)

    def _blocks(self) -> Iterator[tuple[slice, Float[Tensor, "groups _block _end"]]]:
        """Yield each block of queries, and its scores of the keys up to the last one that any of them sees.

        Scores are those of :func:`index_scores` in float32, and -inf where a query does not see a key.
        """
        order, pads = self.positions.cummax(0).values, self.positions < 0
        padded = bool(pads.any())
        for start in range(0, len(self.at), QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            at = self.at[block]
            queries = IndexQueries(self.queries.queries[:, :, block], self.queries.gates[:, :, block])
            first_last = torch.stack([at[0], at[-1]]).to(self.positions.dtype)
            early, end = torch.searchsorted(order, first_last, right=True).tolist()
            scores = index_scores(queries, self.keys[:, :end]).float()
            if padded:
                scores.masked_fill_(pads[:end], -torch.inf)
            scores[..., early:].masked_fill_(self.positions[early:end] > at[:, None], -torch.inf)
            yield block, scores
