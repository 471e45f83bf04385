"""RULER's two question tasks: answer from documents. A few of them matter, the others distract.

Source: RULER, arXiv 2404.06654: SQuAD (qa_1) and HotpotQA (qa_2); distractors come first from the same article or
question, then from any. Differs: a HotpotQA sample needs only its supporting paragraphs, so that short lengths are
possible (RULER always shows all ten); questions come in random order; a question that does not fit with its own
paragraphs is skipped. With a file of one format, "all of ruler" makes both tasks from it, and the tag ``source`` names
the format.
"""

import random
from collections.abc import Iterator

from vestige.bench.sample import Turn
from vestige.bench.tasks import TaskSpec, sources
from vestige.bench.tasks.fitting import SizedSample, key, named_length
from vestige.bench.tasks.questions import Question, Questions, Source
from vestige.errors import InputError

MAX_NEW_TOKENS = 32
WANTED: dict[str, Source] = {"qa_1": "squad", "qa_2": "hotpot"}
_FORMATS: dict[Source, str] = {"squad": "SQuAD", "hotpot": "HotpotQA"}
_SHORTEST = 8
"""Tokens of a document at least."""
_ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


def generate(spec: TaskSpec, name: str) -> Iterator[SizedSample]:
    """Yield a sample for every question that fits, in an order that follows from the seed.

    Raises:
        InputError: The file has the other format, and the user named this task; or, at the end, there are no more
            questions.
    """
    length = named_length(spec, f"ruler/{name}")
    wanted = WANTED[name]
    data = sources.qa(spec, wanted)
    if data.source != wanted and spec.part is not None:
        formats = f"questions in {_FORMATS[wanted]}'s format, but {spec.qa} is in {_FORMATS[data.source]}'s"
        raise InputError(f"ruler/{name} needs {formats}")
    listed = list(range(len(data.questions)))
    random.Random(key(spec, f"ruler/{name}", -1)).shuffle(listed)
    fitting, least = 0, None
    for which in listed:
        found = _make_sample(spec, data, data.questions[which], f"{key(spec, f'ruler/{name}', 0)}/{which}")
        tokens = spec.measure((found.build(found.smallest),))
        least = tokens if least is None else min(least, tokens)
        if tokens <= length:
            fitting += 1
            yield found
    raise InputError(
        f"ruler/{name} has {fitting} questions in {spec.split} that fit --length {length} "
        f"(of {len(listed)}, the shortest of {least} tokens), fewer than --samples asks for"
    )


def _make_sample(spec: TaskSpec, data: Questions, question: Question, seed: str) -> SizedSample:
    """Return the sample of one question; its units are documents."""
    rng = random.Random(seed)
    near = rng.sample(question.near, len(question.near))
    own = {*question.gold, *near}
    room = named_length(spec, "ruler") // _SHORTEST
    far = [text for text in rng.sample(data.paragraphs, min(room, len(data.paragraphs))) if text not in own]
    documents = [*question.gold, *near, *far]

    def build(size: int) -> Turn:
        shown = documents[:size]
        random.Random(f"{seed}/{size}").shuffle(shown)
        text = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(shown, 1))
        return Turn(
            context=f"{_ASK}\n\nThe following are given documents.\n\n{text}\n",
            question=f"{_ASK}\n\nQuestion: {question.question}",
            answers=question.answers,
            answer_prefix="Answer:",
            metric="string_match_part",
            max_new_tokens=spec.reply_limit(question.answers, MAX_NEW_TOKENS),
        )

    smallest = len(question.gold)
    return SizedSample(build=build, smallest=smallest, largest=len(documents), tags={"source": data.source})
