"""Read a text, erase a passage from the cache, and answer questions: the work of ``vestige erase``."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige import erasers
from vestige.cache.attach import attach
from vestige.erasers.base import EraseReport
from vestige.erasers.erase import erase
from vestige.errors import InputError
from vestige.pipelines.document_qa import RunConfig, RunResult, ask, read
from vestige.spans import Span
from vestige.text import locate
from vestige.text.chat_template import ChatTemplate


@dataclass(frozen=True, kw_only=True)
class EraseConfig:
    """A text with questions, a passage to erase, and an eraser. Exactly one of ``span_text`` and ``span`` is given.

    Args:
        run: Text, questions and budget.
        span_text: A passage that occurs once in the text.
        span: ``A:B``, tokens of the text, B not included.
        method: Name of an eraser, with options if wanted.

    Raises:
        InputError: Too few or too many spans, one that cannot be read, or an unknown eraser.
    """

    run: RunConfig
    span_text: str | None = None
    span: str | None = None
    method: str = "learned"

    def __post_init__(self) -> None:
        if (self.span_text is None) == (self.span is None):
            raise InputError("give exactly one of --span-text TEXT and --span A:B")
        if self.run.cache is not None:
            raise InputError("erase reads a text: give --context FILE")
        self.tokens()
        erasers.make(self.method)

    def tokens(self) -> tuple[int, int] | None:
        """Return the numbers of ``--span``, or None if the passage is given as text."""
        if self.span is None:
            return None
        first, colon, last = self.span.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal()):
            raise InputError(f"--span takes A:B, two token numbers of the text, got {self.span!r}")
        return int(first), int(last)

    def locate(self, template: ChatTemplate, text: str) -> Span:
        """Return the span of the passage among the ids of the context."""
        offsets, tokens = template.offsets(text), self.tokens()
        if tokens is not None:
            return locate.find_numbered(*tokens, offsets)
        assert self.span_text is not None, "checked when the config was made"
        return locate.find(text, self.span_text, offsets)


@dataclass(frozen=True)
class EraseResult:
    """Answers after the erase, and its report."""

    run: RunResult
    report: EraseReport
    passage: str
    """Text of the erased tokens."""

    def as_dict(self, model: str, chunk: int) -> dict[str, Any]:
        """Return the row that ``--json`` prints."""
        report = self.report
        return self.run.as_dict(model, chunk) | {
            "method": report.method,
            "exact": report.exact,
            "edit_s": report.edit_s,
            "span": [report.spans[0].span.start, report.spans[0].span.end],
            "slots_dropped": report.slots_dropped,
            "slots_replaced": report.slots_replaced,
            "slots_left": report.slots_left,
            "suffix_left": report.suffix_left,
            "tokens_recomputed": report.tokens_recomputed,
            "memory_free_of_span": report.memory.value,
        }


def erase_text(
    config: EraseConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[int, int], None] | None = None,
) -> EraseResult:
    """Read a text, erase a passage, and answer questions.

    The erase is timed on its second run: the first one, on a fork, loads the adapter and warms up.

    Args:
        config: Text, questions, passage and eraser.
        model: The model; attached for as long as this runs.
        tokenizer: Tokenizer of the model.
        progress: Called with (tokens read, tokens in all).

    Raises:
        VestigeError: Any subclass.
    """
    template, eraser = ChatTemplate(tokenizer), erasers.make(config.method)
    text = config.run.text()
    assert text is not None, "checked when the config was made"
    questions = [template.question(question) for question in config.run.questions]
    ids, span = template.context(text), config.locate(template, text)
    with torch.no_grad(), attach(model):
        started = time.perf_counter()
        cache = read(config.run, model, ids, questions, progress)
        prefill_s = time.perf_counter() - started
        erase(cache.fork(), span, eraser, model=model, input_ids=ids)
        done = erase(cache, span, eraser, model=model, input_ids=ids)
        result = ask(config.run, model, tokenizer, cache, questions, prefill_s)
    passage = str(tokenizer.decode(ids[0, span.start : span.end].tolist()))
    return EraseResult(result, done.report, passage)
