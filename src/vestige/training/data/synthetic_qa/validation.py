"""What answers are worth once pairs are really gone: how policies are validated while they are trained."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from vestige.cache.attach import attach
from vestige.cache.kv_cache import KVCache
from vestige.cache.prefill import prefill
from vestige.memory.base import Memory
from vestige.models.compat import cache_argument
from vestige.policies import Full
from vestige.policies.base import Policy
from vestige.training.data.synthetic_qa.sequences import Conversation, SequenceMaker
from vestige.training.sampler import derive_seed

Question = tuple[Tensor, Tensor]
"""Ids of a question, ``1 question``, and of its answer, `` answer``."""


@dataclass(frozen=True, kw_only=True)
class ValidationSample:
    """A tale to validate on: its text, and questions with their answers, each asked behind the text alone."""

    context: Int[Tensor, "1 context"]
    asked: tuple[Question, ...]


def find_validation_samples(
    maker: SequenceMaker, model: PreTrainedModel, prose: Sequence[Sequence[str]], count: int
) -> list[ValidationSample]:
    """Return tales whose answers the full cache knows, all questions that it fails left out.

    Args:
        maker: Says how long they are.
        model: Asked what it knows.
        prose: Sentences by document, not trained on.
        count: Tales wanted; fewer come if the model knows next to nothing.
    """
    found: list[ValidationSample] = []
    for index in range(4 * count):
        rng = random.Random(derive_seed(maker.seed, "held", index))
        talk = maker.fit_conversation(rng, prose, maker.length)
        if talk is None:
            continue
        made = _held(maker, talk)
        if known := _find_known(model, made):
            found.append(ValidationSample(context=made.context, asked=known))
        if len(found) == count:
            break
    return found


def evaluate(
    model: PreTrainedModel, policy: Policy, held: Sequence[ValidationSample], memory: Memory | None = None
) -> Mapping[str, float]:
    """Return loss and share of right answers under a policy, of those that the full cache gets right."""
    answered = [one for tale in held for one in _answered(model, policy, tale, memory)]
    if not answered:
        return {"answers": 0.0}
    losses, exact = zip(*answered, strict=True)
    return {"loss": sum(losses) / len(losses), "exact": sum(exact) / len(exact), "answers": float(len(exact))}


def _held(maker: SequenceMaker, talk: Conversation) -> ValidationSample:
    asked = []
    for one in talk.asked:
        question = maker.frame.question(one.question, one.prefix)
        asked.append((question, torch.tensor(maker.answer(one))))
    return ValidationSample(context=torch.tensor([maker.context(talk)]), asked=tuple(asked))


def _find_known(model: PreTrainedModel, told: ValidationSample) -> tuple[Question, ...]:
    """Return the questions that the full cache answers right."""
    answered = _answered(model, Full(), told)
    return tuple(one for one, (_, exact) in zip(told.asked, answered, strict=True) if exact)


@torch.no_grad()
def _answered(
    model: PreTrainedModel, policy: Policy, told: ValidationSample, memory: Memory | None = None
) -> list[tuple[float, bool]]:
    """Return for each question the loss of its answer, and whether every token of it is the most likely one."""
    cache, device = KVCache(model, policy, memory=memory), model.device
    found = []
    with attach(model):
        prefill(model, told.context.to(device), cache)
        for question, answer in told.asked:
            fed = torch.cat([question, answer[None, :-1]], 1).to(device)
            out = model(input_ids=fed, **cache_argument(cache.fork()), logits_to_keep=len(answer))
            logits, target = out.logits[0].float(), answer.to(device)
            exact = bool((logits.argmax(-1) == target).all())
            found.append((float(cross_entropy(logits, target)), exact))
    return found
