"""Validate policies on held-out stories: the loss and accuracy of answers after a real eviction."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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

QuestionIds = tuple[Tensor, Tensor]
"""Ids of a question, ``1 question``, and of its answer, `` answer``."""


@dataclass(frozen=True, kw_only=True)
class ValidationSample:
    """A held-out text, and questions with their answers, each asked directly after the text."""

    context: Int[Tensor, "1 context"]
    questions: tuple[QuestionIds, ...]


def find_validation_samples(
    maker: SequenceMaker, model: PreTrainedModel, texts: Sequence[Sequence[str]], count: int
) -> list[ValidationSample]:
    """Return samples with only the questions that the model answers with its full cache.

    Args:
        maker: Makes the conversations, and sets their length.
        model: Answers the questions.
        texts: Sentences of each held-out text.
        count: Samples wanted; fewer come if the model answers next to nothing.
    """
    found: list[ValidationSample] = []
    for index in range(4 * count):
        rng = random.Random(derive_seed(maker.seed, "held", index))
        conversation = maker.fit_conversation(rng, texts, maker.length)
        if conversation is None:
            continue
        sample = _make_sample(maker, conversation)
        if known := _find_known(model, sample):
            found.append(replace(sample, questions=known))
        if len(found) == count:
            break
    return found


def evaluate(
    model: PreTrainedModel, policy: Policy, samples: Sequence[ValidationSample], memory: Memory | None = None
) -> Mapping[str, float]:
    """Return the mean loss of the answers, the share of exact ones and their number, under a policy."""
    answered = [answer for sample in samples for answer in _answer(model, policy, sample, memory)]
    if not answered:
        return {"answers": 0.0}
    losses, exact = zip(*answered, strict=True)
    return {"loss": sum(losses) / len(losses), "exact": sum(exact) / len(exact), "answers": float(len(exact))}


def _make_sample(maker: SequenceMaker, conversation: Conversation) -> ValidationSample:
    questions = (
        (maker.template.question(question.question, question.prefix), torch.tensor(maker.answer_ids(question)))
        for question in conversation.questions
    )
    return ValidationSample(context=torch.tensor([maker.context_ids(conversation)]), questions=tuple(questions))


def _find_known(model: PreTrainedModel, sample: ValidationSample) -> tuple[QuestionIds, ...]:
    """Return the questions that the model answers with its full cache."""
    answered = _answer(model, Full(), sample)
    return tuple(question for question, (_, exact) in zip(sample.questions, answered, strict=True) if exact)


@torch.no_grad()
def _answer(
    model: PreTrainedModel, policy: Policy, sample: ValidationSample, memory: Memory | None = None
) -> list[tuple[float, bool]]:
    """Return, for each question, the loss of its answer, and whether every token of it is the most likely one."""
    cache, device = KVCache(model, policy, memory=memory), model.device
    found = []
    with attach(model):
        prefill(model, sample.context.to(device), cache)
        for question, answer in sample.questions:
            ids = torch.cat([question, answer[None, :-1]], 1).to(device)
            out = model(input_ids=ids, **cache_argument(cache.fork()), logits_to_keep=len(answer))
            logits, target = out.logits[0].float(), answer.to(device)
            exact = bool((logits.argmax(-1) == target).all())
            found.append((float(cross_entropy(logits, target)), exact))
    return found
