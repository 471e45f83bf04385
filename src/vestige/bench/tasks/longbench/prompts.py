"""Prompts of LongBench samples: the user's, the data set's own, or the ones shipped with vestige.

The shipped prompts (``data/longbench_prompts.json``) have words of their own, so that they can be shipped. Their scores
differ from those of the published prompts, and the tag ``prompts`` of every sample names the prompts used. Instructions
before the question are part of the context, so that the context can be read, and evicted, on its own.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from vestige.text.jsonl import Entry, entry, read_whole

_PLACE = re.compile(r"\{(\w+)\}")
_V2_PLACES = ("question", "choice_A", "choice_B", "choice_C", "choice_D")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Texts with places, such as ``{context}``, for the columns of a sample."""

    context: str = "{context}"
    question: str
    answer_prefix: str = ""
    max_new_tokens: int | None = None
    """Longest reply; None is the data set's own limit."""


@cache
def load_shipped_prompts() -> dict[str, Prompt]:
    """Return the shipped prompts by data set; the keys are all data sets that there are."""
    name = "longbench_prompts.json"
    given = json.loads(resources.files("vestige").joinpath("data", name).read_text(encoding="utf-8"))
    return _prompts(entry(given, name), given)


def choose(dataset: str, sample: Entry, given: Mapping[str, Prompt]) -> tuple[Prompt, str]:
    """Return the prompt for a sample, and its tag: ``file``, ``dataset`` or ``vestige``.

    Args:
        dataset: A key of :func:`load_shipped_prompts`.
        sample: One with columns ``question`` and ``answer_prefix``, as in kvpress's data, has its data set's prompt.
        given: The user's prompts, by data set.
    """
    if dataset in given:
        return given[dataset], "file"
    if sample.has("question") and sample.has("answer_prefix"):
        limit = sample.number("max_new_tokens") if sample.has("max_new_tokens") else None
        return Prompt(question="{question}", answer_prefix="{answer_prefix}", max_new_tokens=limit), "dataset"
    return load_shipped_prompts()[dataset], "vestige"


def fill(template: str, sample: Entry, **replaced: str) -> str:
    """Return a template with a column, or its replacement, in each place; filled-in text is not searched again."""
    return _PLACE.sub(lambda place: replaced[place[1]] if place[1] in replaced else sample.text(place[1]), template)


def read(path: Path | None) -> dict[str, Prompt]:
    """Return the prompts of a JSON file: an object for each data set, named as in LongBench, or longbench-v2.

    It has a ``question``, and may have ``context``, ``answer_prefix`` and ``max_new_tokens``. The context holds
    ``{context}``, the question may hold ``{input}``, or ``{question}`` and ``{choice_A}`` to ``{choice_D}`` (v2).

    Raises:
        InputError: The file is missing, not JSON, or has a name, place or value that cannot be used.
    """
    if path is None:
        return {}
    return _prompts(entry(read_whole(path), str(path)), load_shipped_prompts())


def _prompts(given: Entry, known: Collection[str]) -> dict[str, Prompt]:
    given.check_keys(known, "data set")
    return {name: _prompt(name, entry(value, f"{given.where}, {name}")) for name, value in given.columns.items()}


def _prompt(dataset: str, given: Entry) -> Prompt:
    valid = ("context", "question", "answer_prefix", "max_new_tokens")
    given.check_keys(valid)
    values: dict[str, Any] = {key: given.text(key) for key in valid[:3] if key in given.columns or key == "question"}
    if given.has("max_new_tokens"):
        values["max_new_tokens"] = given.number("max_new_tokens")
    prompt = Prompt(**values)
    if "{context}" not in prompt.context:
        raise given.error("'context' has no place for {context}")
    if not prompt.question.strip() and not prompt.answer_prefix.strip():
        raise given.error("'question' is empty")
    _check_places(given, "context", prompt.context, ("context",))
    _check_places(given, "question", prompt.question, _V2_PLACES if dataset == "longbench-v2" else ("input",))
    _check_places(given, "answer_prefix", prompt.answer_prefix, ())
    return prompt


def _check_places(given: Entry, key: str, template: str, valid: Collection[str]) -> None:
    for name in _PLACE.findall(template):
        if name not in valid:
            known = ", ".join(f"{{{place}}}" for place in valid) or "none"
            raise given.error(f"{key!r} has a place {{{name}}}; there can be: {known}")
