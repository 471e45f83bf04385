"""Training retention gates as the papers do, in one function, to be read from top to bottom.

:class:`RetentionTask` is the one to use; with ``forgets="gradually"`` both come to the same loss. Left out here: blocks
(a T x T matrix for each layer is held for the backward pass), counting at some moments rather than at all, sliding
layers, the warm start, forgetting at once, competition within layers or heads, validation, resuming, several processes,
the learning rate's schedule, and all checks.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from vestige.models.anatomy import check
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
        model: With attention "eager": its masks are added to the logits. Frozen by this.
        gates: Changed in place.
        sequences: Documents with questions and answers.
        lr: Learning rate.
        capacity: Share of a document's pairs that shall be kept.
        capacity_weight: Of the price of keeping more.
        text_weight: Of the places of the texts, against answers.
    """
    model.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(gates.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for packed in sequences:
        # 1. Who sees whom, and how old a pair is when it is looked at. Documents do not see each other.
        tokens = packed.ids.shape[1]
        age = torch.arange(tokens)[:, None] - torch.arange(tokens)
        seen = (age >= 0) & (torch.arange(tokens) >= packed.starts[:, None])
        never = torch.zeros(tokens, tokens).masked_fill(~seen, torch.finfo(torch.float32).min)

        # 2. What the full model says at the places that matter: the answers, and some of the texts.
        at = torch.cat([packed.answers, packed.others])
        given: dict[str, Any] = {
            "input_ids": packed.ids,
            "position_ids": (torch.arange(tokens) - packed.starts)[None],
            "attention_mask": never[None, None],
            "use_cache": False,
            "logits_to_keep": at,
        }
        with torch.no_grad():
            wanted = model(**given).logits[0].float().log_softmax(-1)

        # 3. What it says when every pair fades: age x log beta is added to the logits, layer by layer, as the gates
        #    say of what enters the layer's attention.
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
        logits = model(**given).logits[0].float().log_softmax(-1)
        for hook in hooks:
            hook.remove()

        # 4. The loss: say what the full model says, say what is right, and keep few pairs over all layers and heads.
        count = len(packed.answers)
        kl = kl_div(logits, wanted, log_target=True, reduction="none").sum(-1)
        right = cross_entropy(logits[:count], packed.ids[0, packed.answers + 1])
        betas = torch.cat([one[0] for one in log_beta])  # (rows, tokens)
        kept = (torch.exp(age.clamp_min(0) * betas[:, None]) * seen).sum((0, 2))
        room = capacity * packed.sizes * len(betas)
        most = seen.sum(1) * len(betas)
        over = (kept - room).clamp_min(0) / (most - room).clamp_min(1)
        price = over.sum() / (over > 0).sum().clamp_min(1)
        loss = kl[:count].mean() + right + text_weight * kl[count:].mean() + capacity_weight * price

        # 5. One step of AdamW; the gradient is no longer than 1.
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses
