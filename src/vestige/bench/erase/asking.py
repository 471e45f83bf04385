"""Asking an edited cache, and comparing it with the clean one: what each says, and how likely the clean reply is."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vestige.bench.greedy import Decoded, decode
from vestige.cache import KVCache
from vestige.clock import now
from vestige.joining import join
from vestige.policies import Full
from vestige.reading import forward, padding, prefill


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


class Asked:
    """Caches that were asked one question, all in one forward; nothing that is asked or replied is evicted.

    Args:
        model: An attached model.
        caches: Each holds a context; left as they are. Several must be joinable.
        question: Ids behind the contexts.
    """

    def __init__(self, model: PreTrainedModel, caches: Sequence[KVCache], question: Int[Tensor, "1 question"]) -> None:
        self.model = model
        self.cache = caches[0].fork(Full()) if len(caches) == 1 else join(caches)
        fed = question.expand(len(caches), -1).to(model.device)
        started = now(model.device)
        self.logits = prefill(model, fed, self.cache, settle=False)
        self.first_token_s = now(model.device) - started

    def replies(self, limit: int, stop: Collection[int]) -> Decoded:
        """Return the greedy reply of each cache, of at most so many tokens."""
        fork = self.cache.fork()
        return decode(lambda token: forward(self.model, token, fork), self.logits, [limit] * len(self.logits), stop)

    def forced(self, reply: tuple[int, ...]) -> Float[Tensor, "batch reply vocab"]:
        """Return the logits before each token of a reply that is put into the model's mouth, in float32."""
        fed = torch.tensor([reply[:-1]] * len(self.logits), device=self.model.device)
        if not fed.numel():
            return self.logits[:, None].float()
        fork = self.cache.fork()
        later = self.model(input_ids=fed, past_key_values=fork, use_cache=True, **padding(fed, fork)).logits
        return torch.cat([self.logits[:, None], later], 1).float()


def compare(clean_logits: Float[Tensor, "reply vocab"], logits: Float[Tensor, "reply vocab"]) -> Against:
    """Return how logits compare with the clean ones."""
    wanted, found = clean_logits.log_softmax(-1), logits.log_softmax(-1)
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
    agree = (wanted.argmax(-1) == found.argmax(-1)).float().mean()
    return Against(max(float(kl), 0.0), float(agree))
