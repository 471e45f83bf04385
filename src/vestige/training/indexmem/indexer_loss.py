"""The indexer's lesson: which tokens of a text will be looked at, as a distribution over them.

Source: IndexMem, arXiv 2605.25475: teacher and student are pooled over queries by their maximum, made distributions by
a softmax over keys, and compared by ``KL(teacher || student)``; first tokens, which are always kept, take no part.
Ours: a teacher of the queries behind the text, which are what reads pairs after an eviction, beside the paper's of the
text's own; and the gradient of a maximum through its winner alone, so that nothing of all queries times all keys is
held. Within a group of heads attention is added up before it is made a distribution, and what a question's reply looks
at is foretold where the question was read.
"""

from typing import Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from vestige.errors import InputError, unknown_name_message
from vestige.nn.indexer import Comparison, Indexer, IndexQueries, LayerIndexer, asked
from vestige.training.indexmem.teacher_trace import LayerTrace

Teacher = Literal["answers", "text"]
TEACHERS: tuple[str, ...] = get_args(Teacher)
_BLOCK = 256


def teacher_of(name: str) -> Teacher:
    """Return the teacher of that name.

    Raises:
        InputError: There is none.
    """
    if name not in TEACHERS:
        raise InputError(unknown_name_message("teacher", str(name), TEACHERS))
    return cast(Teacher, name)


def indexer_loss(
    indexer: Indexer, layers: list[LayerTrace], text: int, told: slice, *, teacher: Teacher, sink: int
) -> Float[Tensor, ""]:
    """Return how unlike what the indexer foretells is to what is looked at, the mean over layers and scores.

    Args:
        indexer: Gets the gradients.
        layers: What each layer made of a text and what stands behind it.
        text: Tokens of the text: what is told apart.
        told: What is to be foretold, by the queries before it: a reply, or all that stands behind the text.
        teacher: Whether that is what is foretold, or what those queries themselves look at.
        sink: First tokens that take no part.
    """
    losses = []
    for layer in layers:
        own = indexer.at(layer.layer_idx)
        if teacher == "answers":
            paid = attention_to_text(layer, text, told, sink)
        else:
            paid = attention_within_text(layer, text, told.start, sink)
        wanted = paid.view(own.groups, -1, paid.shape[1]).mean(1)  # a head that looks at sinks has little to say
        wanted = wanted / wanted.sum(-1, keepdim=True).clamp_min(1e-30)
        said = max_index_scores(own, layer, text, told.start)[:, sink:].log_softmax(-1)
        losses.append(kl_div(said, wanted, reduction="none").sum(-1).mean())
    return torch.stack(losses).mean()


def max_index_scores(indexer: LayerIndexer, layer: LayerTrace, text: int, asking: int) -> Float[Tensor, "groups text"]:
    """Return the most that any of the first ``asking`` queries asks for each token of a text, with its gradient."""
    keys = indexer.index_keys(layer.hidden[:text])
    found = indexer.index_queries(layer.hidden[:asking])
    with torch.no_grad():
        winner = _compared(found, keys).by_whom()
    groups = torch.arange(len(keys), device=keys.device)[:, None]
    chosen = IndexQueries(
        found.queries.transpose(1, 2)[groups, winner].flatten(0, 1)[:, :, None],
        found.gates.transpose(1, 2)[groups, winner].flatten(0, 1)[:, :, None],
    )
    return asked(chosen, keys.flatten(0, 1)[:, None]).view(len(keys), text)


@torch.no_grad()
def max_index_scores_of_text(indexer: LayerIndexer, layer: LayerTrace, text: int) -> Float[Tensor, "groups text"]:
    """Return the most that any query of a text asks for each of its tokens."""
    keys = indexer.index_keys(layer.hidden[:text])
    return _compared(indexer.index_queries(layer.hidden[:text]), keys).most()


def _compared(asking: IndexQueries, keys: Float[Tensor, "groups text size"]) -> Comparison:
    """Return queries beside the keys of the first of the tokens that ask."""
    at = torch.arange(asking.queries.shape[2], device=keys.device)
    return Comparison(asking, keys, at, at[: keys.shape[1]])


@torch.no_grad()
def attention_to_text(layer: LayerTrace, text: int, told: slice, sink: int) -> Float[Tensor, "heads counted"]:
    """Return the most attention that any of some later tokens pays to each token of a text but the first."""
    logits = layer.logits(told)
    return (logits - layer.weigh(logits)[..., None]).amax(1)[:, sink:text].exp()


@torch.no_grad()
def attention_within_text(layer: LayerTrace, text: int, asking: int, sink: int) -> Float[Tensor, "heads counted"]:
    """Return the softmax over a text's tokens of the largest product of each with the first ``asking`` queries."""
    largest = torch.full((len(layer.queries), text), -torch.inf, device=layer.keys.device)
    for start in range(0, asking, _BLOCK):
        most = layer.logits(slice(start, min(start + _BLOCK, asking))).amax(1)[:, :text]
        torch.maximum(largest[:, : most.shape[1]], most, out=largest[:, : most.shape[1]])
    return largest[:, sink:].softmax(-1)
