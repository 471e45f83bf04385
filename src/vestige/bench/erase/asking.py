"""Asking an edited cache, and comparing it with the clean one: what each says, and how likely the clean reply is."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vestige.bench.erase.items import Item
from vestige.bench.greedy import decode
from vestige.cache import KVCache
from vestige.clock import now
from vestige.policies import Full
from vestige.reading import forward, prefill


@dataclass(frozen=True)
class Reply:
    """A greedy reply and what it took.

    Args:
        ids: The one that ended it included.
        first_token_s: Seconds of reading the question, up to the logits of the reply's first token.
        decode_s: Seconds of decoding the rest.
    """

    ids: tuple[int, ...]
    first_token_s: float
    decode_s: float


@dataclass(frozen=True)
class Clean:
    """What the model says to one question when it never read what is erased: the reply, and its logits, in float32."""

    reply: Reply
    logits: Float[Tensor, "reply vocab"]


@dataclass(frozen=True)
class Against:
    """How an edited cache compares with the clean one under the clean reply, mean over its tokens.

    Args:
        kl: Kullback-Leibler divergence of the cache's distribution from the clean one, in nats.
        top1: Share of tokens at which both have the same most likely one.
    """

    kl: float
    top1: float


def read(model: PreTrainedModel, ids: Int[Tensor, "1 context"], cache: KVCache) -> KVCache:
    """Read a context with nothing asked, and return the cache."""
    prefill(model, ids.to(model.device), cache)
    return cache


def clean(model: PreTrainedModel, item: Item, stop: Collection[int]) -> list[Clean]:
    """Return the replies on a fresh reading of the remaining ids, of which nothing is evicted."""
    cache = read(model, item.clean, KVCache(model, Full()))
    found = []
    for ids, question in zip(item.questions, item.sample.questions, strict=True):
        asked = Asked(model, cache, ids)
        reply = asked.reply(question.max_new_tokens, stop)
        found.append(Clean(reply, asked.forced(reply.ids)))
    return found


class Asked:
    """A cache that was asked one question.

    Args:
        model: An attached model.
        cache: Holds the context; left as it is.
        question: Ids behind the context.
    """

    def __init__(self, model: PreTrainedModel, cache: KVCache, question: Int[Tensor, "1 question"]) -> None:
        self.model, self.cache = model, cache.fork()
        started = now(model.device)
        self.logits = prefill(model, question.to(model.device), self.cache, settle=False)
        self.first_token_s = now(model.device) - started

    def reply(self, limit: int, stop: Collection[int]) -> Reply:
        """Return the greedy reply, of at most so many tokens."""
        fork = self.cache.fork()
        said = decode(lambda token: forward(self.model, token, fork), self.logits, [limit], stop)
        return Reply(said.replies[0], self.first_token_s, said.seconds)

    def forced(self, reply: tuple[int, ...]) -> Float[Tensor, "reply vocab"]:
        """Return the logits before each token of a reply that is put into the model's mouth, in float32."""
        fed = torch.tensor([reply[:-1]], device=self.model.device)
        if not fed.numel():
            return self.logits.float()
        later = self.model(input_ids=fed, past_key_values=self.cache.fork(), use_cache=True).logits
        return torch.cat([self.logits, later[0]]).float()


def compare(clean_logits: Float[Tensor, "reply vocab"], logits: Float[Tensor, "reply vocab"]) -> Against:
    """Return how logits compare with the clean ones."""
    wanted, found = clean_logits.log_softmax(-1), logits.log_softmax(-1)
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
    agree = (wanted.argmax(-1) == found.argmax(-1)).float().mean()
    return Against(max(float(kl), 0.0), float(agree))
