"""The indexer's loss: its distribution over the tokens of a text against that of later attention.

Source: IndexMem, arXiv 2605.25475: teacher and student are pooled over queries by their maximum, normalized by a
softmax over keys, and compared by ``KL(teacher || student)``; the first tokens, which are always kept, do not count.
Our own: a teacher of the queries after the text, since these read pairs after an eviction, beside the paper's teacher
of the text's queries; and gradients that pass through the query of the maximum only, so that no matrix of all queries
and keys is held. Attention is added up within a group of heads before it is normalized. If the indexer has read a
question, it predicts the attention of that question's reply.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from vestige.nn.indexer import Comparison, Indexer, IndexQueries, LayerIndexer, index_scores
from vestige.training.indexmem.teacher_trace import LayerTrace

TEACHERS = ("answers", "text")
_BLOCK = 256


def indexer_loss(
    indexer: Indexer, layers: list[LayerTrace], text: int, predicted: slice, *, teacher: str, sink: int
) -> Float[Tensor, ""]:
    """Return KL(attention, indexer), averaged over layers and score groups.

    Args:
        indexer: Receives the gradients.
        layers: Traces of a text and the tokens after it.
        text: Number of tokens of the text.
        predicted: Tokens whose attention the indexer predicts from all queries before them: a reply, or all tokens
            after the text.
        teacher: Attention to predict: "answers", that of these tokens, or "text", that of the queries before them.
        sink: First tokens, which do not count.
    """
    losses = []
    for layer in layers:
        own = indexer.at(layer.layer_idx)
        if teacher == "answers":
            paid = attention_to_text(layer, text, predicted, sink)
        else:
            paid = attention_within_text(layer, text, predicted.start, sink)
        wanted = paid.view(own.groups, -1, paid.shape[1]).mean(1)  # heads that attend to sinks weigh little
        wanted = wanted / wanted.sum(-1, keepdim=True).clamp_min(1e-30)
        scores = max_index_scores(own, layer, text, predicted.start)[:, sink:].log_softmax(-1)
        losses.append(kl_div(scores, wanted, reduction="none").sum(-1).mean())
    return torch.stack(losses).mean()


def max_index_scores(indexer: LayerIndexer, layer: LayerTrace, text: int, asking: int) -> Float[Tensor, "groups text"]:
    """Return the largest score of each token of a text over the first ``asking`` queries, with its gradient."""
    keys = indexer.index_keys(layer.hidden[:text])
    found = indexer.index_queries(layer.hidden[:asking])
    with torch.no_grad():
        winner = _compared(found, keys).argmax()
    groups = torch.arange(len(keys), device=keys.device)[:, None]
    best = IndexQueries(
        found.queries.transpose(1, 2)[groups, winner].flatten(0, 1)[:, :, None],
        found.gates.transpose(1, 2)[groups, winner].flatten(0, 1)[:, :, None],
    )
    return index_scores(best, keys.flatten(0, 1)[:, None]).view(len(keys), text)


@torch.no_grad()
def max_index_scores_of_text(indexer: LayerIndexer, layer: LayerTrace, text: int) -> Float[Tensor, "groups text"]:
    """Return the largest score of each token of a text over the text's own queries."""
    keys = indexer.index_keys(layer.hidden[:text])
    return _compared(indexer.index_queries(layer.hidden[:text]), keys).max()


def _compared(asking: IndexQueries, keys: Float[Tensor, "groups text size"]) -> Comparison:
    """Return a comparison of queries with the keys of a text, which is at the beginning of the queries' tokens."""
    at = torch.arange(asking.queries.shape[2], device=keys.device)
    return Comparison(asking, keys, at, at[: keys.shape[1]])


@torch.no_grad()
def attention_to_text(layer: LayerTrace, text: int, reading: slice, sink: int) -> Float[Tensor, "heads counted"]:
    """Return the largest attention of a range of later tokens to each token of a text after the sinks."""
    logits = layer.logits(reading)
    return (logits - layer.log_normalizer(logits)[..., None]).amax(1)[:, sink:text].exp()


@torch.no_grad()
def attention_within_text(layer: LayerTrace, text: int, asking: int, sink: int) -> Float[Tensor, "heads counted"]:
    """Return the softmax, over a text's tokens, of each token's largest logit for the first ``asking`` queries."""
    largest = torch.full((len(layer.queries), text), -torch.inf, device=layer.keys.device)
    for start in range(0, asking, _BLOCK):
        most = layer.logits(slice(start, min(start + _BLOCK, asking))).amax(1)[:, :text]
        torch.maximum(largest[:, : most.shape[1]], most, out=largest[:, : most.shape[1]])
    return largest[:, sink:].softmax(-1)
