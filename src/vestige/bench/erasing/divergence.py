"""The same questions to the clean cache and to edited ones: their replies, and the likelihood of the clean reply."""

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
class Divergence:
    """How an edited cache differs from the clean one under the clean reply, mean over its tokens.

    Args:
        kl: Kullback-Leibler divergence of the cache's distribution from the clean one, in nats.
        top1: Share of tokens at which both have the same most likely one.
    """

    kl: float
    top1: float


def read(model: PreTrainedModel, ids: Int[Tensor, "1 context"], cache: KVCache) -> KVCache:
    """Read a context without a question, and return the cache."""
    prefill(model, ids.to(model.device), cache)
    return cache


class BatchedCaches:
    """Caches that answer questions in one forward of an attached model; no question or reply is evicted, or stays.

    The caches hold a context each, and are left as they are. Several are joined where they can be.
    """

    def __init__(self, model: PreTrainedModel, caches: Sequence[KVCache]) -> None:
        self.model = model
        self.cache = caches[0].fork(Full()) if len(caches) == 1 else join(caches)

    @contextmanager
    def ask(self, question: Int[Tensor, "1 question"]) -> Iterator["QuestionedCaches"]:
        """Feed a question after the contexts; it is removed on exit."""
        with self.cache.rolled_back():
            fed = question.expand(len(self.cache.seen), -1).to(self.model.device)
            started = synchronized_time(self.model.device)
            logits = prefill(self.model, fed, self.cache, settle=False)
            yield QuestionedCaches(self.model, self.cache, logits, synchronized_time(self.model.device) - started)


@dataclass(frozen=True)
class QuestionedCaches:
    """Caches that have read a question each, as the rows of one cache."""

    model: PreTrainedModel
    cache: KVCache
    logits: Float[Tensor, "batch vocab"]
    """After the question."""
    first_token_s: float
    """Seconds of reading the question."""

    def decode(self, limit: int, stop: Collection[int]) -> Decoded:
        """Decode the greedy reply of each cache, of at most ``limit`` tokens."""
        with self.cache.rolled_back():
            return decode(
                lambda token: forward(self.model, token, self.cache), self.logits, [limit] * len(self.logits), stop
            )

    def score(self, reply: tuple[int, ...]) -> Float[Tensor, "batch reply vocab"]:
        """Return the logits before each token of a given reply, in float32."""
        fed = torch.tensor([reply[:-1]] * len(self.logits), device=self.model.device)
        if not fed.numel():
            return self.logits[:, None].float()
        with self.cache.rolled_back():
            given = {**cache_argument(self.cache), **padding_inputs(fed, self.cache)}
            later = self.model(input_ids=fed, use_cache=True, **given).logits
        return torch.cat([self.logits[:, None], later], 1).float()


def compare(clean_logits: Float[Tensor, "reply vocab"], logits: Float[Tensor, "reply vocab"]) -> Divergence:
    """Compare logits with the clean ones."""
    clean, edited = clean_logits.log_softmax(-1), logits.log_softmax(-1)
    kl = (clean.exp() * (clean - edited)).sum(-1).mean()
    agree = (clean.argmax(-1) == edited.argmax(-1)).float().mean()
    return Divergence(max(float(kl), 0.0), float(agree))
