"""The main job on the real default model. Skipped where it was not downloaded yet (`make demo` does)."""

from importlib.resources import files
from pathlib import Path

import torch

from tests.conftest import on_the_default_model
from vestige import Budget, KVCache, attach, load, policies, prefill
from vestige.pipelines.answer import answer
from vestige.text.chat_template import ChatTemplate

QUESTION, ANSWER = "What is the pass phrase for the night gate?", "copper lantern"


@on_the_default_model
def test_the_default_model_reads_within_its_budget_and_answers():
    model, tokenizer = load("smollm2-135m", progress=False)
    document = Path(str(files("vestige") / "data" / "harbour.txt")).read_text()
    place = document.index(ANSWER)
    frame = ChatTemplate(tokenizer)
    context, question = frame.context(document[place - 3000 : place + 2000]), frame.question(QUESTION)
    length, most = context.shape[1] + question.shape[1], []
    with torch.no_grad(), attach(model):
        cache = KVCache(model, policies.KeyDiff(budget=Budget.fraction(0.5), share="model"))
        prefill(model, context, cache, chunk=256, length=length, progress=lambda _: most.append(cache.held))
        report = cache.report()
        reply = answer(model, tokenizer, cache, question, max_new_tokens=20)
    assert report.held == report.budget_total == length // 2 * 90
    assert max(most) <= report.budget_total + 256 * 90
    assert report.kv_bytes < 0.62 * report.full_kv_bytes
    assert ANSWER in reply.text
