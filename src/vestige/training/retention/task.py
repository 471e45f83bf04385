"""Retention gates as something to train: answer like the full cache while attention forgets, and forget a lot.

Source: TRIM-KV, arXiv 2512.03324 (forward KL to the same model with full attention, plus the next token's cross
entropy); DBTrimKV, arXiv 2605.09649 (one limit over all layers and heads). Differs: answers count for themselves, and
beside them only some places of the texts; the two parts of their loss are added, where the paper takes the mean; the
limit is a share of each document's length unless it is given in tokens.
Our own: a warm start (:mod:`~vestige.training.retention.warm_start`), and forgetting at once (``evicted.py``). What the
papers do, ``forgets="gradually"``, stands in one function in ``flat.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.budget import Budget
from vestige.errors import InputError, unknown_name_message
from vestige.models.anatomy import check
from vestige.nn.retention_gates import Gates
from vestige.policies.retention import Retention
from vestige.policies.selection import Share, share_of
from vestige.training.data.synthetic_qa.sequences import PackedSequence, TokenizedDocument
from vestige.training.data.synthetic_qa.shares import drawn_share
from vestige.training.data.synthetic_qa.task import Parts, StoryTask, average_over_documents
from vestige.training.data.synthetic_qa.validation import evaluate
from vestige.training.retention.capacity_loss import expected_kept, over_capacity
from vestige.training.retention.eviction_loss import SoftEviction, answer_log_probs, read_text
from vestige.training.retention.soft_attention import GatedAttention, use_gates
from vestige.training.retention.soft_topk import competing_rows, gate_log_beta, log_kept
from vestige.training.retention.warm_start import measure_answers, measure_replay, ranking_loss, regression_loss

WARM = ("answers", "replay")
WARM_LOSSES = ("lives", "ranking")
FORGETS = ("gradually", "at_once")


@dataclass(frozen=True, kw_only=True)
class RetentionOptions:
    """What sequences look like, and the loss.

    Raises:
        InputError: A number out of range.
    """

    length: int = 1024
    """Most tokens of a sequence, of one document or of several."""
    least: int = 160
    """Fewest tokens that a document is given; lengths between are drawn evenly by their logarithm."""
    others: int = 64
    """Places of the texts, beside the answers, at which the model must go on as the full one does."""
    capacity: float = 0.05
    """Pairs that a row may keep on average: below 1 a share of the document, else tokens."""
    capacity_weight: float = 1.0
    """Of the price of keeping more."""
    text_weight: float = 0.25
    """Of the places of the texts, against answers."""
    moments: int = 128
    """Moments of a sequence at which what is kept is counted."""
    budget: float = 0.1
    """Share of the pairs that is kept when answers are validated."""
    warm: int = 0
    """First sequences, from which gates learn what later tokens look at, without gradients through the model. A
    multiple of the batch."""
    warm_by: str = "answers"
    """Which later tokens: those of the questions and answers, or of a replay of the text, as in KVzip."""
    warm_loss: str = "ranking"
    """How: by regression on lives that follow from what is looked at, or by what a ranking of all pairs loses."""
    asked: int = 4
    """Most questions about one text."""
    forgets: str = "at_once"
    """How attention forgets while it is trained: gradually, with age, as in the papers; or at once behind a text, as an
    eviction does, to any of several budgets. Capacity, others, moments and text_weight are of the former alone."""
    share: Share = "model"
    """Whose pairs compete for room: those of the model, of each layer or of each head."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.capacity > 0 or not 0 < self.budget <= 1:
            raise InputError(f"capacity must be above 0 and budget in (0, 1], got {self.capacity} and {self.budget}")
        if min(self.capacity_weight, self.text_weight) < 0 or self.moments < 1:
            raise InputError("weights must not be negative, and moments at least 1")
        if self.warm < 0:
            raise InputError(f"warm must not be negative, got {self.warm}")
        if self.warm_by not in WARM:
            raise InputError(unknown_name_message("warm-by", self.warm_by, WARM))
        if self.warm_loss not in WARM_LOSSES:
            raise InputError(unknown_name_message("warm-loss", self.warm_loss, WARM_LOSSES))
        if self.forgets not in FORGETS:
            raise InputError(unknown_name_message("forgets", self.forgets, FORGETS))
        if self.asked < 1:
            raise InputError(f"asked must be at least 1, got {self.asked}")
        share_of(self.share)


class RetentionTask(StoryTask):
    """A task that trains retention gates: a stream of sequences, each a function of its index alone.

    Args:
        model: Frozen by this.
        tokenizer: The model's.
        gates: What is trained.
        prose: Sentences to train on, by document.
        held: Sentences to validate on, by document.
        options: Of sequences and loss.
        validation: Tales to validate on.

    Raises:
        InputError: Sequences would be longer than the model can read, or their numbers do not go together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        gates: Gates,
        prose: Sequence[Sequence[str]],
        held: Sequence[Sequence[str]],
        options: RetentionOptions,
        *,
        validation: int = 16,
    ) -> None:
        super().__init__(
            model,
            tokenizer,
            prose,
            held,
            length=options.length,
            least=options.least,
            others=options.others,
            asked=options.asked,
            seed=options.seed,
            validation=validation,
        )
        self.gates, self.options = gates, options
        self._groups = competing_rows(gates.config, options.share)

    @property
    def module(self) -> nn.Module:
        """The gates."""
        return self.gates

    def loss(self, index: int) -> Mapping[str, Tensor]:
        """Return the loss of a sequence in its parts, and the share of pairs that the gates would keep."""
        packed = self.sequence("train", index)
        if index < self.options.warm:
            parts = average_over_documents(packed, self._looked_at)
        elif self.options.forgets == "at_once":
            parts = average_over_documents(packed, self._evicted)
        else:
            parts = self._faded(packed)
        return {**parts, "tokens": parts["loss"].new_tensor(float(packed.ids.shape[1]))}

    def validate(self) -> Mapping[str, float]:
        """Return how answers fare when pairs are really evicted: on tales about texts that are not trained on.

        The gates compute as they do in use, in the model's dtype.
        """
        budget = Budget.fraction(self.options.budget)
        policy = Retention(gates=self.gates.for_inference(self.model.dtype), budget=budget, share=self.options.share)
        return evaluate(self.model, policy, self.to_validate())

    def identity(self) -> Mapping[str, Any]:
        """Return the model, the shape of the gates, the options and the data."""
        return {
            **super().identity(),
            "gates": asdict(self.gates.config),
            "options": asdict(self.options),
        }

    def _looked_at(self, one: TokenizedDocument) -> Parts:
        """Return how far the gates are from what is looked at in a text."""
        ids, text = one.ids, one.text
        by_replay = self.options.warm_by == "replay"
        looked = measure_replay(self.model, ids[:, :text]) if by_replay else measure_answers(self.model, ids, text)
        if self.options.warm_loss == "ranking":
            return {"loss": ranking_loss(self.gates, looked, drawn_share(), self._groups)}
        share = self.options.capacity
        return {
            "loss": regression_loss(self.gates, looked, share if share < 1 else min(share / text, 1.0), self._groups)
        }

    def _evicted(self, one: TokenizedDocument) -> Parts:
        """Return how far answers are from the full model's once some of a text is forgotten, at once."""
        whole = read_text(self.model, one.ids[:, : one.text])
        behind, at = one.ids[:, one.text :], one.answers - one.text
        with torch.no_grad():
            wanted = answer_log_probs(self.model, whole, behind, at)
        kept = log_kept(gate_log_beta(self.gates, whole.states), drawn_share(), self._groups)
        rows = kept.split(list(self.gates.config.kv_heads))
        fading = SoftEviction(dict(zip(self.gates.config.layers, rows, strict=True)))
        logits = answer_log_probs(self.model, whole, behind, at, fading)
        parts = _unlike(logits, wanted, behind[0, at + 1])
        return {"loss": parts["kl"] + parts["ce"], **parts, "kept": kept.detach().exp().mean()}

    def _faded(self, packed: PackedSequence) -> Parts:
        """Return how far answers and texts are from the full model's while attention fades with age, and its price."""
        at = torch.cat([packed.answers, packed.others])
        with torch.no_grad():
            wanted, _ = self._logits(packed, at, None)
        logits, log_beta = self._logits(packed, at, self.gates)
        count = len(packed.answers)
        parts = _unlike(logits[:count], wanted[:count], packed.ids[0, packed.answers + 1])
        over, kept = self._capacity(packed, log_beta)
        text = _divergence(logits[count:], wanted[count:]) if len(packed.others) else over.new_zeros(())
        loss = parts["kl"] + parts["ce"] + self.options.text_weight * text + self.options.capacity_weight * over
        return {"loss": loss, **parts, "text": text, "capacity": over, "kept": kept}

    def _logits(
        self, packed: PackedSequence, at: Int[Tensor, " some"], gates: Gates | None
    ) -> tuple[Float[Tensor, "some vocab"], Float[Tensor, "rows tokens"] | None]:
        """Return log probabilities of the next token at some places, and log beta of all pairs."""
        logits, log_beta, places = [], [], []
        for begin, end in self._readings(packed):
            inside = ((at >= begin) & (at < end)).nonzero()[:, 0]
            gating = GatedAttention(packed.starts[begin:end] - begin, gates)
            given = {"position_ids": gating.positions, "use_cache": False, "logits_to_keep": at[inside] - begin}
            with use_gates(self.model, gating):
                out = self.model(input_ids=packed.ids[:, begin:end], **given)
            logits.append(out.logits[0].float().log_softmax(-1))
            places.append(inside)
            if gates is not None:
                log_beta.append(gating.packed_log_beta())
        return torch.cat(logits)[torch.cat(places).argsort()], torch.cat(log_beta, 1) if log_beta else None

    def _readings(self, packed: PackedSequence) -> list[tuple[int, int]]:
        """Return from where to where to read at once: all, or where layers look across documents, each of these.

        Attention that gates are trained for never does; whether sliding and linear layers do is up to each model.
        """
        begins = packed.starts.unique_consecutive().tolist()
        anatomy = check(self.model)
        if len(anatomy.evictable) == anatomy.config.num_hidden_layers:
            begins = begins[:1]
        return list(pairwise([*begins, len(packed.starts)]))

    def _capacity(self, packed: PackedSequence, log_beta: Tensor | None) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the price of keeping more than there is room for, and the share of all pairs that is kept."""
        assert log_beta is not None, "gates were at work"
        at = torch.randperm(log_beta.shape[1])[: self.options.moments].sort().values.to(log_beta.device)
        seen = at - packed.starts[at] + 1
        share = self.options.capacity
        room = share * packed.sizes[at] if share < 1 else torch.full_like(seen, share, dtype=torch.float)
        kept = [expected_kept(rows, packed.starts, at) for rows in log_beta.split(list(self._groups))]
        over = [over_capacity(one, seen, rows, room) for one, rows in zip(kept, self._groups, strict=True)]
        left = torch.stack(kept).sum(0).detach() / (seen * len(log_beta))
        return torch.stack(over).mean(), left.mean()


def _unlike(
    logits: Float[Tensor, "answers vocab"], wanted: Float[Tensor, "answers vocab"], following: Int[Tensor, " answers"]
) -> Parts:
    """Return how unlike two distributions are, and how unlikely what follows."""
    return {"kl": _divergence(logits, wanted), "ce": cross_entropy(logits, following)}


def _divergence(logits: Float[Tensor, "some vocab"], wanted: Float[Tensor, "some vocab"]) -> Float[Tensor, ""]:
    return kl_div(logits, wanted, log_target=True, reduction="none").sum(-1).mean()
