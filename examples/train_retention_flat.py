"""The papers' training of retention gates in one function, to read from top to bottom.

Use :class:`~vestige.training.retention.task.RetentionTask` for real runs; with ``forgets="gradually"`` both have the
same loss. Not here: blocks (the backward pass holds a T x T matrix for each layer), counts at some moments only,
sliding layers, the warm start, forgetting at once, competition within layers or heads, validation, resuming, several
processes, a learning rate schedule, and all checks.

Run it from the repository's root, with a model of attention "eager" and ``documents``, lists of sentences::

    from examples.train_retention_flat import train

    maker = SequenceMaker(tokenizer, length=512, least=160, others=64, seed=0)
    losses = train(model, Gates.fresh(model), (maker.make_sequence(("train", i), documents) for i in range(100)))
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from vestige.models.layout import check
from vestige.nn.retention_gates import Gates
from vestige.training.data.synthetic_qa.sequences import PackedSequence


def train(
    model: PreTrainedModel,
    gates: Gates,
    sequences: Iterable[PackedSequence],
    *,
    lr: float = 2e-3,
    capacity: float = 0.05,
    capacity_weight: float = 1.0,
    text_weight: float = 0.25,
) -> list[float]:
    """Train gates on sequences, one a step, and return the loss of every step.

    Args:
        model: With attention "eager", which adds masks to the logits. The function freezes it.
        gates: Changed in place.
        sequences: Documents with questions and answers.
        lr: Learning rate.
        capacity: Share of a document's pairs to keep.
        capacity_weight: Weight of the loss for keeping more.
        text_weight: Weight of the text positions, against answers.
    """
    model.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(gates.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for packed in sequences:
        # 1. Compute the age of each pair at each query, and the causal mask within each document.
        tokens = packed.ids.shape[1]
        age = torch.arange(tokens)[:, None] - torch.arange(tokens)
        visible = (age >= 0) & (torch.arange(tokens) >= packed.starts[:, None])
        mask = torch.zeros(tokens, tokens).masked_fill(~visible, torch.finfo(torch.float32).min)

        # 2. Get the full model's distributions at the answers and at some positions of the texts.
        at = torch.cat([packed.answers, packed.others])
        inputs: dict[str, Any] = {
            "input_ids": packed.ids,
            "position_ids": (torch.arange(tokens) - packed.starts)[None],
            "attention_mask": mask[None, None],
            "use_cache": False,
            "logits_to_keep": at,
        }
        with torch.no_grad():
            wanted = model(**inputs).logits[0].float().log_softmax(-1)

        # 3. Get its distributions while pairs fade: each layer adds age x log beta to the logits, where log beta is the
        #    gates' output for the hidden states that enter the layer's attention.
        log_beta: list[Tensor] = []

        def fade(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            age: Tensor = age,
            log_beta: list[Tensor] = log_beta,
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            layer_idx: Any = module.layer_idx
            log_beta.append(gates(layer_idx, kwargs["hidden_states"]))
            groups = model.config.num_attention_heads // log_beta[-1].shape[1]
            faded = (age.clamp_min(0) * log_beta[-1][:, :, None]).repeat_interleave(groups, 1)
            return args, kwargs | {"attention_mask": kwargs["attention_mask"] + faded}

        modules = check(model).attentions.values()
        hooks = [module.register_forward_pre_hook(fade, with_kwargs=True) for module in modules]
        logits = model(**inputs).logits[0].float().log_softmax(-1)
        for hook in hooks:
            hook.remove()

        # 4. Compute the loss: divergence from the full model, cross entropy of the answers, and the excess of kept
        #    pairs over the capacity, over all layers and heads.
        count = len(packed.answers)
        kl = kl_div(logits, wanted, log_target=True, reduction="none").sum(-1)
        ce = cross_entropy(logits[:count], packed.ids[0, packed.answers + 1])
        betas = torch.cat([layer[0] for layer in log_beta])  # (rows, tokens)
        kept = (torch.exp(age.clamp_min(0) * betas[:, None]) * visible).sum((0, 2))
        room = capacity * packed.sizes * len(betas)
        most = visible.sum(1) * len(betas)
        over = (kept - room).clamp_min(0) / (most - room).clamp_min(1)
        excess = over.sum() / (over > 0).sum().clamp_min(1)
        loss = kl[:count].mean() + ce + text_weight * kl[count:].mean() + capacity_weight * excess

        # 5. Do one step of AdamW; the gradient's norm is clipped to 1.
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses
