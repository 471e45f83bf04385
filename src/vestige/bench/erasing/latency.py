"""The time that an edit takes, by length: the edit, the first token after it, and decoding, without the reading.

Machines are noisy, so methods alternate: every round times each of them once, on a fork of one reading. Figures are
medians over all rounds except the first, which warms up.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from vestige import erasers
from vestige.bench.erasing.config import add_bounds
from vestige.bench.erasing.divergence import BatchedCaches, read
from vestige.bench.results.aggregate import Row
from vestige.bench.results.provenance import collect_provenance
from vestige.cache.attach import attach
from vestige.cache.kv_cache import KVCache
from vestige.erasers.erase import erase
from vestige.errors import InputError
from vestige.models.layout import check
from vestige.policies import Full
from vestige.spans import Span

FEWEST_ROUNDS = 5
FIGURES = ("edit_s", "first_token_s", "decode_ms", "tokens_recomputed")


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """The lengths and methods to time.

    Raises:
        InputError: An unknown method, too few rounds, or a length that has no room for the span.
    """

    lengths: tuple[int, ...] = (1000, 2000, 4000, 8000)
    """Tokens read before the edit; question and reply need positions after them."""
    methods: tuple[str, ...] = ()
    """Erasers, with options if wanted. The bounds are timed whatever is named."""
    before: int = 100
    """Tokens before the span."""
    span: int = 100
    question: int = 32
    """Tokens of the question."""
    reply: int = 16
    """Tokens of the reply, the first one included."""
    rounds: int = 5
    """Timed rounds, without the warm-up."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) <= self.before + self.span:
            raise InputError(f"--length must be more than {self.before + self.span} tokens, got {self.lengths}")
        if self.rounds < FEWEST_ROUNDS:
            raise InputError(f"a median needs at least {FEWEST_ROUNDS} rounds, got {self.rounds}")
        if min(self.before, self.span, self.question) < 1 or self.reply < 2:
            raise InputError("before, span and question must be at least 1 token, and the reply at least 2")
        add_bounds(self.methods)

    @property
    def place(self) -> Span:
        """The span that is erased."""
        return Span(self.before, self.before + self.span)


def latency(
    config: LatencyConfig,
    model: PreTrainedModel,
    *,
    name: str,
    progress: Callable[[int, int, str], None] = lambda done, of, what: None,
) -> list[Row]:
    """Time every method at every length, over random ids, and return a row for each.

    The model is attached for as long as this runs; progress is (edits done, in all, what is next).

    Raises:
        VestigeError: A length is beyond the model's positions, or a method cannot work with this model.
    """
    limit, longest = check(model).max_positions, max(config.lengths) + config.question + config.reply
    if limit is not None and longest > limit:
        raise InputError(f"length, question and reply are {longest} tokens; the model has {limit} positions")
    facts = {"model": name, "seed": config.seed, "rounds": config.rounds, **collect_provenance(model)}
    facts |= {"span": config.span, "before": config.before}
    rows: list[Row] = []
    done, total = 0, len(config.lengths) * len(add_bounds(config.methods)) * (config.rounds + 1)

    def report(what: str) -> None:
        nonlocal done
        progress(done, total, what)
        done += 1

    with torch.no_grad(), attach(model):
        for length in config.lengths:
            found = _time_length(config, model, length, report)
            rows += [{**facts, "length": length, "method": method, **figures} for method, figures in found.items()]
    report("timed")
    return rows


def _time_length(
    config: LatencyConfig, model: PreTrainedModel, length: int, report: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Return the figures of each method at one length."""
    draw = torch.Generator().manual_seed(config.seed)
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocab, (1, length + config.question), generator=draw)
    context, question = ids[:, :length].to(model.device), ids[:, length:]
    cache = read(model, context, KVCache(model, Full()))
    taken: dict[str, list[dict[str, float]]] = {method: [] for method in add_bounds(config.methods)}
    for _ in range(config.rounds + 1):
        for method, rounds in taken.items():
            report(f"{length} {method}")
            fork = cache.fork()
            edit = erase(fork, config.place, erasers.make(method), model=model, input_ids=context).report
            with BatchedCaches(model, [fork]).ask(question) as asked:
                decoded = asked.decode(config.reply, ())
            figures = (edit.edit_s, asked.first_token_s, 1e3 * decoded.seconds / decoded.steps, edit.tokens_recomputed)
            rounds.append(dict(zip(FIGURES, map(float, figures), strict=True)))
    return {
        method: {name: statistics.median(figures[name] for figures in rounds[1:]) for name in FIGURES}
        for method, rounds in taken.items()
    }
