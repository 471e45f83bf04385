"""Retention gates as something to train: answer like the full cache while attention forgets, and forget a lot.

Source: TRIM-KV, arXiv 2512.03324 (forward KL to the same model with full attention, plus the next token's cross
entropy); DBTrimKV, arXiv 2605.09649 (one limit over all layers and heads). Differs: answers count for themselves, and
beside them only some places of the texts; the limit is a share of each document's length unless it is given in tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError, unknown
from vestige.gates import Gates
from vestige.learn.order import seed_of
from vestige.learn.retention.capacity import expected_kept, over_capacity
from vestige.learn.retention.gated import Gating, gated
from vestige.learn.retention.hard import Held, held_tales, judged
from vestige.learn.retention.sequences import Packed, SequenceMaker
from vestige.learn.retention.warm import Looked, asked, ranking, regression, replayed
from vestige.models import check

WARM = ("answers", "replay")
WARM_LOSSES = ("lives", "ranking")
_SHARES = 0.02, 0.4
"""Of the pairs that a ranking keeps: drawn for each text, evenly by their logarithm."""


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
    warm_loss: str = "lives"
    """How: by regression on lives that follow from what is looked at, or by what a ranking of all pairs loses."""
    asked: int = 4
    """Most questions about one text."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.capacity > 0 or not 0 < self.budget <= 1:
            raise InputError(f"capacity must be above 0 and budget in (0, 1], got {self.capacity} and {self.budget}")
        if min(self.capacity_weight, self.text_weight) < 0 or self.moments < 1:
            raise InputError("weights must not be negative, and moments at least 1")
        if self.warm < 0:
            raise InputError(f"warm must not be negative, got {self.warm}")
        if self.warm_by not in WARM:
            raise InputError(unknown("warm-by", self.warm_by, WARM))
        if self.warm_loss not in WARM_LOSSES:
            raise InputError(unknown("warm-loss", self.warm_loss, WARM_LOSSES))
        if self.asked < 1:
            raise InputError(f"asked must be at least 1, got {self.asked}")


class RetentionTask:
    """Retention gates as a :class:`vestige.learn.Task`: a stream of sequences, each a function of its index alone.

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
        limit = check(model).max_positions
        if limit is not None and options.length > limit:
            raise InputError(f"sequences of {options.length} tokens do not fit the model's {limit} positions")
        self.model, self.gates, self.options = model.requires_grad_(False).eval(), gates, options
        self.maker = SequenceMaker(
            tokenizer,
            length=options.length,
            least=options.least,
            others=options.others,
            asked=options.asked,
            seed=options.seed,
        )
        self.prose, self.held, self.validation = prose, held, validation
        self._to_validate: list[Held] = []

    @property
    def module(self) -> nn.Module:
        """The gates."""
        return self.gates

    @property
    def num_samples(self) -> None:
        """Sequences come in a stream."""
        return None

    def loss(self, index: int) -> Mapping[str, Tensor]:
        """Return the loss of a sequence in its parts, and the share of pairs that the gates would keep."""
        packed = self.maker.sequence(("train", index), self.prose).to(self.model.device)
        if index < self.options.warm:
            return self._looked_at(packed)
        at = torch.cat([packed.answers, packed.others])
        with torch.no_grad():
            wanted, _ = self._logits(packed, at, None)
        logits, log_beta = self._logits(packed, at, self.gates)
        count = len(packed.answers)
        kl = kl_div(logits, wanted, log_target=True, reduction="none").sum(-1)
        following = packed.ids[0, (at + 1).clamp_max(packed.ids.shape[1] - 1)]
        ce = cross_entropy(logits[:count], following[:count])
        over, kept = self._capacity(packed, log_beta)
        text = kl[count:].mean() if len(packed.others) else kl.new_zeros(())
        parts = {"kl": kl[:count].mean(), "ce": ce, "text": text, "capacity": over, "kept": kept}
        loss = parts["kl"] + ce + self.options.text_weight * text + self.options.capacity_weight * over
        return {"loss": loss, **parts, "tokens": over.new_tensor(float(packed.ids.shape[1]))}

    def validate(self) -> Mapping[str, float]:
        """Return how answers fare when pairs are really evicted: on tales about texts that are not trained on."""
        if not self._to_validate:
            self._to_validate = held_tales(self.maker, self.model, self.held, self.validation)
        return judged(self.model, self.gates, self._to_validate, self.options.budget)

    def identity(self) -> Mapping[str, Any]:
        """Return the model, the shape of the gates, the options and the data."""
        return {
            "model": check(self.model).fingerprint(),
            "gates": asdict(self.gates.config),
            "options": asdict(self.options),
            "documents": [seed_of(*text[:3]) for text in (*self.prose, *self.held)],
        }

    def _looked_at(self, packed: Packed) -> Mapping[str, Tensor]:
        """Return how far the gates are from what later tokens look at, the mean over the tokens of the texts."""
        losses = []
        for start, text in zip(packed.starts.unique_consecutive().tolist(), packed.texts.tolist(), strict=True):
            ids = packed.ids[:, start : start + int(packed.sizes[start])]
            by_replay = self.options.warm_by == "replay"
            looked = replayed(self.model, ids[:, :text]) if by_replay else asked(self.model, ids, text)
            losses.append(text * self._unlike(looked, text))
        loss = torch.stack(losses).sum() / packed.texts.sum()
        return {"loss": loss, "tokens": loss.new_tensor(float(packed.ids.shape[1]))}

    def _unlike(self, looked: Looked, text: int) -> Float[Tensor, ""]:
        """Return how far the gates are from what was looked at in a text of so many tokens."""
        if self.options.warm_loss == "ranking":
            least, most = _SHARES
            return ranking(self.gates, looked, least * (most / least) ** float(torch.rand(())))
        share = self.options.capacity
        return regression(self.gates, looked, share if share < 1 else min(share / text, 1.0))

    def _logits(
        self, packed: Packed, at: Int[Tensor, " some"], gates: Gates | None
    ) -> tuple[Float[Tensor, "some vocab"], Float[Tensor, "rows tokens"] | None]:
        """Return log probabilities of the next token at some places, and log beta of all pairs."""
        gating = Gating(packed.starts, gates)
        with gated(self.model, gating):
            out = self.model(input_ids=packed.ids, position_ids=gating.positions, use_cache=False, logits_to_keep=at)
        logits: Tensor = out.logits[0].float().log_softmax(-1)
        return logits, None if gates is None else gating.packed_log_beta()

    def _capacity(self, packed: Packed, log_beta: Tensor | None) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the price of keeping more than there is room for, and the share of all pairs that is kept."""
        assert log_beta is not None, "gates were at work"
        tokens, rows = log_beta.shape[1], log_beta.shape[0]
        at = torch.randperm(tokens)[: self.options.moments].sort().values.to(log_beta.device)
        kept = expected_kept(log_beta, packed.starts, at)
        seen = at - packed.starts[at] + 1
        share = self.options.capacity
        room = share * packed.sizes[at] if share < 1 else torch.full_like(seen, share, dtype=torch.float)
        return over_capacity(kept, seen, rows, room), (kept.detach() / (seen * rows)).mean()
