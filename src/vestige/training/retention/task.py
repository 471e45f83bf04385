"""The task that trains retention gates: answer like the full cache while attention forgets, and forget a lot.

Source: TRIM-KV, arXiv 2512.03324 (forward KL to the same model with full attention, plus the next token's cross
entropy); DBTrimKV, arXiv 2605.09649 (one limit over all layers and heads). Differs: answers have a weight of their own,
and beside them only some positions of the texts count; the two parts of their loss are added, where the paper averages
them; the limit is a share of each document's length unless it is given in tokens.
Our own: a warm start (:mod:`~vestige.training.retention.warm_start`), and forgetting at once
(:mod:`~vestige.training.retention.eviction_loss`). :mod:`examples.train_retention_flat` does what the papers do,
``forgets="gradually"``, in one function.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.budget import Budget
from vestige.errors import InputError, unknown_name_message
from vestige.models.layout import check
from vestige.nn.retention_gates import Gates
from vestige.policies.retention import Retention
from vestige.policies.selection import Share, parse_share
from vestige.training.data.sentences import Texts
from vestige.training.data.synthetic_qa.sequences import PackedSequence, TokenizedDocument
from vestige.training.data.synthetic_qa.task import Parts, StoryOptions, StoryTask, average_over_documents, draw_share
from vestige.training.data.synthetic_qa.validation import evaluate
from vestige.training.retention.capacity_loss import expected_kept, over_capacity
from vestige.training.retention.eviction_loss import SoftEviction, answer_log_probs, read_text
from vestige.training.retention.soft_attention import GatedAttention, use_gates
from vestige.training.retention.soft_topk import competing_rows, gate_log_beta, log_kept
from vestige.training.retention.warm_start import measure_answers, measure_replay, ranking_loss, regression_loss
from vestige.training.trainer import Made, Training

WARM = ("answers", "replay")
WARM_LOSSES = ("lives", "ranking")
FORGETS = ("gradually", "at_once")
_WHAT = {
    "gradually": "retention gates as in DBTrimKV (arXiv 2605.09649): what each pair is worth, from when it is written",
    "at_once": "retention gates shaped as in DBTrimKV (arXiv 2605.09649), trained by soft evictions of our own: what "
    "each pair is worth, from when it is written",
}
_MOST_BIAS = 18.0  # the papers' value; at 20.7 gradients vanish


@dataclass(frozen=True, kw_only=True)
class RetentionOptions(StoryOptions):
    """Options of the sequences and the loss.

    Raises:
        InputError: A number is out of range.
    """

    others: int = 64
    """Text positions, beside the answers, at which the model must continue like the full one."""
    capacity: float = 0.05
    """Pairs that a row may keep on average: below 1 a share of the document, else tokens."""
    capacity_weight: float = 1.0
    """Weight of the loss for keeping more."""
    text_weight: float = 0.25
    """Weight of the text positions, against answers."""
    moments: int = 128
    """Moments of a sequence at which kept pairs are counted."""
    warm: int = 0
    """First sequences, on which gates learn the attention of later tokens, without gradients through the model. A
    multiple of the batch."""
    warm_by: str = "answers"
    """The later tokens: those of the questions and answers, or of a replay of the text, as in KVzip."""
    warm_loss: str = "ranking"
    """Regression on lifetimes that follow from the attention ("lives"), or the importance that a ranking loses."""
    forgets: str = "at_once"
    """How attention forgets in training: gradually, with age, as in the papers; or at once after a text, like an
    eviction to a random budget. Capacity, others, moments and text_weight belong to the former alone."""
    share: Share = "model"
    """Which pairs compete for room: those of the model, of each layer or of each head."""

    def __post_init__(self) -> None:
        if not self.capacity > 0 or not 0 < self.budget <= 1:
            raise InputError(f"capacity must be above 0 and budget in (0, 1], got {self.capacity} and {self.budget}")
        if min(self.capacity_weight, self.text_weight) < 0 or self.moments < 1:
            raise InputError("weights must not be negative, and moments at least 1")
        if self.warm < 0:
            raise InputError(f"warm must not be negative, got {self.warm}")
        for option, valid in (("warm_by", WARM), ("warm_loss", WARM_LOSSES), ("forgets", FORGETS)):
            if (value := getattr(self, option)) not in valid:
                raise InputError(unknown_name_message(option.replace("_", "-"), value, valid))
        if self.asked < 1:
            raise InputError(f"asked must be at least 1, got {self.asked}")
        parse_share(self.share)


class RetentionTask(StoryTask):
    """A task that trains retention gates: a stream of sequences, each a function of its index alone.

    Args:
        gates: The trained weights.

    The other arguments and the errors are those of :class:`StoryTask`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        gates: Gates,
        texts: Texts,
        held_out: Texts,
        options: RetentionOptions,
        *,
        validation: int = 16,
    ) -> None:
        super().__init__(model, tokenizer, texts, held_out, options, others=options.others, validation=validation)
        self.module = self.gates = gates
        self.options = options
        self._groups = competing_rows(gates.config, options.share)

    def loss(self, index: int) -> Mapping[str, Tensor]:
        """Return the loss of a sequence in its parts, and the share of pairs that the gates would keep."""
        packed = self.sequence("train", index)
        if index < self.options.warm:
            parts = average_over_documents(packed, self._warm_loss)
        elif self.options.forgets == "at_once":
            parts = average_over_documents(packed, self._eviction_loss)
        else:
            parts = self._fading_loss(packed)
        return {**parts, "tokens": parts["loss"].new_tensor(float(packed.ids.shape[1]))}

    def validate(self) -> Mapping[str, float]:
        """Return loss and accuracy of answers about held-out texts, after a real eviction.

        The gates compute in the model's dtype, as they do in use.
        """
        budget = Budget.fraction(self.options.budget)
        policy = Retention(gates=self.gates.for_inference(self.model.dtype), budget=budget, share=self.options.share)
        return evaluate(self.model, policy, self._validation_samples)

    def identity(self) -> Mapping[str, Any]:
        """Return the identity of model and data, the shape of the gates and the options."""
        return {**super().identity(), "gates": asdict(self.gates.config), "options": asdict(self.options)}

    def _warm_loss(self, document: TokenizedDocument) -> Parts:
        """Return the distance of the gates from the importance of a text's pairs."""
        ids, text = document.ids, document.text
        by_replay = self.options.warm_by == "replay"
        target = measure_replay(self.model, ids[:, :text]) if by_replay else measure_answers(self.model, ids, text)
        if self.options.warm_loss == "ranking":
            return {"loss": ranking_loss(self.gates, target, draw_share(), self._groups)}
        capacity = self.options.capacity if self.options.capacity < 1 else min(self.options.capacity / text, 1.0)
        return {"loss": regression_loss(self.gates, target, capacity, self._groups)}

    def _eviction_loss(self, document: TokenizedDocument) -> Parts:
        """Return the distance of the answers after a soft eviction from the full model's."""
        text = read_text(self.model, document.ids[:, : document.text])
        following, at = document.ids[:, document.text :], document.answers - document.text
        with torch.no_grad():
            wanted = answer_log_probs(self.model, text, following, at)
        kept = log_kept(gate_log_beta(self.gates, text.states), draw_share(), self._groups)
        rows = kept.split(list(self.gates.config.kv_heads))
        eviction = SoftEviction(dict(zip(self.gates.config.layers, rows, strict=True)))
        logits = answer_log_probs(self.model, text, following, at, eviction)
        parts = _answer_losses(logits, wanted, following[0, at + 1])
        return {"loss": parts["kl"] + parts["ce"], **parts, "kept": kept.detach().exp().mean()}

    def _fading_loss(self, packed: PackedSequence) -> Parts:
        """Return the distance of answers and texts from the full model's under fading attention, with the capacity."""
        at = torch.cat([packed.answers, packed.others])
        with torch.no_grad():
            wanted, _ = self._logits(packed, at, None)
        logits, log_beta = self._logits(packed, at, self.gates)
        count = len(packed.answers)
        parts = _answer_losses(logits[:count], wanted[:count], packed.ids[0, packed.answers + 1])
        over, kept = self._capacity(packed, log_beta)
        text = _divergence(logits[count:], wanted[count:]) if len(packed.others) else over.new_zeros(())
        loss = parts["kl"] + parts["ce"] + self.options.text_weight * text + self.options.capacity_weight * over
        return {"loss": loss, **parts, "text": text, "capacity": over, "kept": kept}

    def _logits(
        self, packed: PackedSequence, at: Int[Tensor, " positions"], gates: Gates | None
    ) -> tuple[Float[Tensor, "positions vocab"], Float[Tensor, "rows tokens"] | None]:
        """Return log probabilities of the next token at some positions, and log beta of all pairs."""
        logits, log_beta, places = [], [], []
        for begin, end in self._find_chunks(packed):
            inside = ((at >= begin) & (at < end)).nonzero()[:, 0]
            gating = GatedAttention(packed.starts[begin:end] - begin, gates)
            inputs = {"position_ids": gating.positions, "use_cache": False, "logits_to_keep": at[inside] - begin}
            with use_gates(self.model, gating):
                out = self.model(input_ids=packed.ids[:, begin:end], **inputs)
            logits.append(out.logits[0].float().log_softmax(-1))
            places.append(inside)
            if gates is not None:
                log_beta.append(gating.packed_log_beta())
        return torch.cat(logits)[torch.cat(places).argsort()], torch.cat(log_beta, 1) if log_beta else None

    def _find_chunks(self, packed: PackedSequence) -> list[tuple[int, int]]:
        """Return the ranges to read at once: the whole sequence, or each document if layers would see others.

        Attention with gates never does; sliding and linear layers may, depending on the model.
        """
        begins = packed.starts.unique_consecutive().tolist()
        anatomy = check(self.model)
        if len(anatomy.evictable) == anatomy.config.num_hidden_layers:
            begins = begins[:1]
        return list(pairwise([*begins, len(packed.starts)]))

    def _capacity(self, packed: PackedSequence, log_beta: Tensor | None) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the capacity loss, and the share of all pairs that is kept."""
        assert log_beta is not None, "gates were used"
        at = torch.randperm(log_beta.shape[1])[: self.options.moments].sort().values.to(log_beta.device)
        seen = at - packed.starts[at] + 1
        share = self.options.capacity
        room = share * packed.sizes[at] if share < 1 else torch.full_like(seen, share, dtype=torch.float)
        kept = [expected_kept(rows, packed.starts, at) for rows in log_beta.split(list(self._groups))]
        over = [over_capacity(group, seen, rows, room) for group, rows in zip(kept, self._groups, strict=True)]
        kept_share = torch.stack(kept).sum(0).detach() / (seen * len(log_beta))
        return torch.stack(over).mean(), kept_share.mean()


@dataclass(frozen=True, kw_only=True)
class RetentionTraining(Training):
    """Options of ``vestige train retention``, beside those of every training; it validates on synthetic questions.

    Args:
        options: Options of sequences and loss.
        width: Width of the gates' inner layers.
        depth: Number of these layers.
        tied: Whether all layers share the last projection.
        bias: Initial bias of the last projection.
    """

    weights: ClassVar[str] = "gates"
    options: RetentionOptions
    width: int = 128
    depth: int = 2
    tied: bool = True
    bias: float = 6.0
    validation: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole_steps(self.options.warm, "the warm start")
        if not self.bias <= _MOST_BIAS:
            raise InputError(f"bias must be at most {_MOST_BIAS:g}, or gates live too long to learn; got {self.bias}")

    def make_task(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts, held_out: Texts
    ) -> Made:
        shape: dict[str, Any] = {"width": self.width, "depth": self.depth, "tied": self.tied, "bias": self.bias}
        gates = Gates.initialize(model, **shape)
        task = RetentionTask(model, tokenizer, gates, texts, held_out, self.options, validation=self.validation)
        return task, [gates], {"what": _WHAT[self.options.forgets], "options": asdict(self.options), "gates": shape}


def _answer_losses(
    logits: Float[Tensor, "answers vocab"], wanted: Float[Tensor, "answers vocab"], tokens: Int[Tensor, " answers"]
) -> Parts:
    """Return the divergence from the wanted distributions, and the cross entropy of the answers' tokens."""
    return {"kl": _divergence(logits, wanted), "ce": cross_entropy(logits, tokens)}


def _divergence(
    logits: Float[Tensor, "positions vocab"], wanted: Float[Tensor, "positions vocab"]
) -> Float[Tensor, ""]:
    return kl_div(logits, wanted, log_target=True, reduction="none").sum(-1).mean()
