"""The main job on the real default model. Skipped where it was not downloaded yet (`make demo` does)."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch

from vestige import Budget, KVCache, attach, load, policies, prefill
from vestige.answer import answer
from vestige.download import is_cached
from vestige.text import Frame

FACT = "The spare key of the boathouse hangs behind the blue barometer."


@pytest.mark.skipif(
    not is_cached("smollm2-135m"), reason="the default model is not in the cache: run `make demo` first"
)
def test_the_default_model_reads_within_its_budget_and_answers():
    model, tokenizer = load("smollm2-135m", progress=False)
    document = Path(str(files("vestige") / "data" / "harbour.txt")).read_text()
    frame = Frame(tokenizer)
    context = frame.context(f"{document[:2500]}\n{FACT}\n{document[2500:4500]}")
    question = frame.question("Where does the spare key of the boathouse hang?")
    policy = policies.KeyDiff(budget=Budget.fraction(0.75))
    with torch.no_grad(), attach(model):
        cache = KVCache(model, policy)
        prefill(model, context, cache, chunk=256, length=context.shape[1] + question.shape[1])
        report = cache.report()
        reply = answer(model, tokenizer, cache, question, max_new_tokens=20)
    assert report.held <= report.budget_total
    assert report.kept_fraction < 0.8 and report.kv_bytes < 0.9 * report.full_kv_bytes
    assert "barometer" in reply.text
