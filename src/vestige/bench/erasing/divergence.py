"""Asking an edited cache, and comparing it with the clean one: what each says, and how likely the clean reply is."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vestige.bench.methods.decode import Decoded, decode
from vestige.cache.batching import join
from vestige.cache.kv_cache import KVCache
from vestige.cache.prefill import prefill
from vestige.models.compat import cache_argument
from vestige.models.forward import forward, padding_inputs
from vestige.policies import Full
from vestige.utils.timing import synchronized_time


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


class Listeners:
    """Caches that are asked in turn, all in one forward; nothing that is asked or replied is evicted, or stays.

    Args:
        model: An attached model.
        caches: Each holds a context; left as they are. Several must be joinable.
    """

    def __init__(self, model: PreTrainedModel, caches: Sequence[KVCache]) -> None:
        self.model = model
        self.cache = caches[0].fork(Full()) if len(caches) == 1 else join(caches)

    @contextmanager
    def asked(self, question: Int[Tensor, "1 question"]) -> Iterator["Asked"]:
        """Feed a question behind the contexts, for as long as it takes to hear the replies."""
        with self.cache.rolled_back():
            fed = question.expand(len(self.cache.seen), -1).to(self.model.device)
            started = synchronized_time(self.model.device)
            logits = prefill(self.model, fed, self.cache, settle=False)
            yield Asked(self.model, self.cache, logits, synchronized_time(self.model.device) - started)


@dataclass(frozen=True)
class Asked:
    """Caches with a question behind each.

    Args:
        model: An attached model.
        cache: Has them as its rows.
        logits: After the question.
        first_token_s: What these took.
    """

    model: PreTrainedModel
    cache: KVCache
    logits: Float[Tensor, "batch vocab"]
    first_token_s: float

    def replies(self, limit: int, stop: Collection[int]) -> Decoded:
        """Return the greedy reply of each cache, of at most so many tokens."""
        with self.cache.rolled_back():
            return decode(
                lambda token: forward(self.model, token, self.cache), self.logits, [limit] * len(self.logits), stop
            )

    def forced(self, reply: tuple[int, ...]) -> Float[Tensor, "batch reply vocab"]:
        """Return the logits before each token of a reply that is put into the model's mouth, in float32."""
        fed = torch.tensor([reply[:-1]] * len(self.logits), device=self.model.device)
        if not fed.numel():
            return self.logits[:, None].float()
        with self.cache.rolled_back():
            given = {**cache_argument(self.cache), **padding_inputs(fed, self.cache)}
            later = self.model(input_ids=fed, use_cache=True, **given).logits
        return torch.cat([self.logits[:, None], later], 1).float()


def compare(clean_logits: Float[Tensor, "reply vocab"], logits: Float[Tensor, "reply vocab"]) -> Against:
    """Return how logits compare with the clean ones."""
    wanted, found = clean_logits.log_softmax(-1), logits.log_softmax(-1)
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
    agree = (wanted.argmax(-1) == found.argmax(-1)).float().mean()
    return Against(max(float(kl), 0.0), float(agree))
