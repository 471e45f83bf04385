"""IndexMem's indexer: small projections that foretell which pairs queries will ask for.

Each layer has one index key and few index queries per token, made of what entered attention. How much a query asks for
a token is a sum over its index heads; a token's importance is the most that any query asked for it. Indexers belong to
one model; they are kept beside it, never put into it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from vestige.errors import InputError
from vestige.models.anatomy import check
from vestige.nn import io

NAME = "indexer"
"""Of the files."""
QUERY_BLOCK = 256
"""Queries that are compared with all keys at a time: nothing of all queries times all keys ever exists."""


@dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """The shape of an indexer, and whose it is.

    Args:
        layers: Indices of the model's evictable layers.
        kv_heads: Of each of them.
        hidden: Size of what enters a layer.
        heads: Index heads for each KV head.
        dim: Size of each KV head's part of the index key.
        apart: Each KV head has scores of its own, by its own index heads, which read its own part of the key; else
            all index heads read the whole key, and a layer has one score for all its KV heads, as in the paper.
        base: Fingerprint of the model.
        model: Its name, for messages.

    Raises:
        InputError: A number out of range.
    """

    layers: tuple[int, ...]
    kv_heads: tuple[int, ...]
    hidden: int
    heads: int = 1
    dim: int = 8
    apart: bool = False
    base: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.kv_heads):
            raise InputError("an indexer needs layers, and the KV heads of each")
        if min(self.hidden, self.heads, self.dim, *self.kv_heads) < 1:
            raise InputError("hidden, heads, dim and kv_heads must be at least 1")


@dataclass(frozen=True, eq=False)
class IndexQueries:
    """What some tokens of a layer ask with. A group is a KV head, or where scores are not apart, all of them.

    Args:
        queries: By group and index head.
        gates: How much each head counts.
    """

    queries: Float[Tensor, "groups heads new size"]
    gates: Float[Tensor, "groups heads new"]


class LayerIndexer(nn.Module):
    """The indexer of one layer.

    Args:
        config: Of the whole.
        place: Of the layer among those of the config.
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
        """Return the index keys of tokens."""
        keys: Tensor = self.keys(hidden.float())
        normed: Tensor = self.key_norm(keys.unflatten(-1, (self.groups, self.size)))
        return normed.transpose(-2, -3)

    def index_queries(self, hidden: Float[Tensor, "new hidden"]) -> IndexQueries:
        """Return what tokens ask with."""
        hidden = hidden.float()
        flat: Tensor = self.queries(hidden)
        asking = self.query_norm(flat.unflatten(-1, (self.groups, -1, self.size))).permute(1, 2, 0, 3)
        gates: Tensor = self.gates(hidden).unflatten(-1, (self.groups, -1)).permute(1, 2, 0)
        return IndexQueries(asking, gates * (gates.shape[1] * self.groups * self.size) ** -0.5)


class Indexer(nn.Module):
    """The indexers of all evictable layers.

    Source: IndexMem, arXiv 2605.25475: one key for all index heads, RMSNorm, ReLU, head gates, the maximum over
    queries. Differs: the paper projects the layer's queries before RoPE, which are a projection of what enters
    attention themselves (normed, in some models); here both are one projection: the same function, and RoPE need not
    be undone for every token. Completed by us: scores of each KV head apart, and ``log_scales``, the log of how large
    each KV head's output is, so that scores of all layers and heads can be compared. It works in float32, which on a
    CPU is faster than bfloat16 for matrices this small.
    """

    log_scales: Tensor

    def __init__(self, config: IndexerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(LayerIndexer(config, place) for place in range(len(config.layers)))
        self.register_buffer("log_scales", torch.zeros(len(config.layers), max(config.kv_heads)))
        self._place = {layer_idx: place for place, layer_idx in enumerate(config.layers)}

    @staticmethod
    def fresh(model: PreTrainedModel, *, heads: int = 1, dim: int = 8, apart: bool = False) -> "Indexer":
        """Return an untrained indexer for a model, in float32.

        Raises:
            ModelError: The model has no evictable layers.
            InputError: A number out of range.
        """
        anatomy = check(model)
        config = IndexerConfig(
            layers=anatomy.evictable,
            kv_heads=tuple(anatomy.kv_heads(i) for i in anatomy.evictable),
            hidden=anatomy.config.hidden_size,
            heads=heads,
            dim=dim,
            apart=apart,
            **io.ownership(model),
        )
        return Indexer(config).to(model.device)

    def at(self, layer_idx: int) -> LayerIndexer:
        """Return the indexer of a layer."""
        found = self.layers[self._place[layer_idx]]
        assert isinstance(found, LayerIndexer)
        return found

    def log_scale(self, layer_idx: int) -> Float[Tensor, " kv_heads"]:
        """Return the log of how large the output of each KV head is."""
        place = self._place[layer_idx]
        return self.log_scales[place, : self.config.kv_heads[place]]

    def leader(self, layer_idx: int, reuse: int) -> int:
        """Return the first layer of the group of ``reuse`` neighbours that a layer belongs to."""
        return self.config.layers[self._place[layer_idx] // reuse * reuse]

    def require_fit(self, model: PreTrainedModel) -> None:
        """Raise a ModelError unless this indexer was made for this model."""
        io.require_fit(self.config, model, "indexer")

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write the weights and the config into a folder."""
        io.save(self, self.config, folder, NAME, dtype=dtype)

    @staticmethod
    def load(folder: Path, model: PreTrainedModel) -> "Indexer":
        """Read an indexer for a model, in float32, without gradients; runs no code from the files.

        Raises:
            ModelError: Missing, damaged, or made for another model.
        """
        indexer = io.load(lambda shape: Indexer(IndexerConfig(**shape)), folder, NAME, "indexer")
        indexer.require_fit(model)
        return indexer.requires_grad_(False).to(model.device)


def asked(asking: IndexQueries, keys: Float[Tensor, "groups held size"]) -> Float[Tensor, "groups new held"]:
    """Return how much each query asks for each key: ReLU of their products, summed over index heads by their gates."""
    products, gates = (asking.queries @ keys[:, None].mT).relu_(), asking.gates[..., None]
    weighed = products * gates if torch.is_grad_enabled() else products.mul_(gates)  # one tensor of queries times keys
    return weighed[:, 0] if weighed.shape[1] == 1 else weighed.sum(1)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Queries and the keys that they are compared with, in blocks of queries, causally.

    Args:
        asking: What the queries ask with.
        keys: Of one batch row, all groups at the same positions.
        at: Position of each query, ascending.
        positions: Position of each key, ascending but for pads, wherever these are: -1, and nobody sees them.
    """

    asking: IndexQueries
    keys: Float[Tensor, "groups held size"]
    at: Int[Tensor, " new"]
    positions: Int[Tensor, " held"]

    def most(self) -> Float[Tensor, "groups held"]:
        """Return the most that any query asks for each key; -inf for what none sees."""
        best = self._each(-torch.inf)
        for _, found in self._blocks():
            end = found.shape[2]
            best[:, :end] = torch.maximum(best[:, :end], found.amax(1))
        return best

    def by_whom(self) -> Int[Tensor, "groups held"]:
        """Return which query asks most for each key; 0 for what none sees."""
        best, winner = self._each(-torch.inf), self._each(0)
        for part, found in self._blocks():
            top, index = found.max(1)
            end = top.shape[1]
            better = top > best[:, :end]
            best[:, :end] = torch.where(better, top, best[:, :end])
            winner[:, :end] = torch.where(better, index + part.start, winner[:, :end])
        return winner

    def total(self) -> Float[Tensor, "groups held"]:
        """Return the sum over all queries that see a key of how much they ask for it."""
        sums = self._each(0.0)
        for _, found in self._blocks():
            sums[:, : found.shape[2]] += found.masked_fill_(found == -torch.inf, 0.0).sum(1)
        return sums

    def _each(self, first: float | int) -> Tensor:
        """Return a number for each key, of the kind that ``first`` is."""
        return torch.full(self.keys.shape[:2], first, device=self.keys.device)

    def _blocks(self) -> Iterator[tuple[slice, Float[Tensor, "groups _block _end"]]]:
        """Yield which queries, and how much they ask for the keys up to the last that any of them sees.

        That is :func:`asked` in float32; -inf where a query does not see a key.
        """
        order, pads = self.positions.cummax(0).values, self.positions < 0
        padded = bool(pads.any())
        for start in range(0, len(self.at), QUERY_BLOCK):
            part = slice(start, start + QUERY_BLOCK)
            at, asking = self.at[part], IndexQueries(self.asking.queries[:, :, part], self.asking.gates[:, :, part])
            seen = torch.stack([at[0], at[-1]]).to(self.positions.dtype)
            early, end = torch.searchsorted(order, seen, right=True).tolist()
            found = asked(asking, self.keys[:, :end]).float()
            if padded:
                found.masked_fill_(pads[:end], -torch.inf)
            found[..., early:].masked_fill_(self.positions[early:end] > at[:, None], -torch.inf)
            yield part, found
