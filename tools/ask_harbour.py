"""Ask eight facts of the demo's document: `.venv/bin/python tools/ask_harbour.py full keydiff:model:0.5 ...`.

The document was written until the full cache answered them, so this compares settings; it is no accuracy.
"""

import sys
from importlib.resources import as_file, files

from vestige.models.loading import load
from vestige.pipelines.document_qa import RunConfig, run

FACTS = {
    "What is the founding year of Marlowick harbour?": "1683",
    "What is the pass phrase for the night gate?": "copper lantern",
    "What is the special number of the dredging licence?": "7294816",
    "What is the name of the ferry cat?": "Admiral Biscuit",
    "What is the name of the Marlowick lifeboat?": "Patient Margaret",
    "What is the radio channel of the Marlowick pilots?": "37",
    "What is the balance of the storm fund?": "83,450",
    "What is the open day of the lighthouse?": "27th",
}


def main(settings: list[str]) -> None:
    """Print, for each policy:share:budget:memory, how many facts its reading still answers, and its bytes."""
    model, tokenizer = load("smollm2-135m")
    with as_file(files("vestige") / "data" / "harbour.txt") as path:
        for setting in settings:
            policy, share, budget, memory = (*setting.split(":"), None, None, None)[:4]
            config = RunConfig(
                questions=tuple(FACTS), context=path, policy=policy, share=share, budget=budget,
                memory=memory or "none", max_new_tokens=24,
            )  # fmt: skip
            result = run(config, model, tokenizer)
            right = sum(fact in reply.text for fact, reply in zip(FACTS.values(), result.answers, strict=True))
            print(f"{setting:<24} {right} of {len(FACTS)}, {result.report.kv_bytes / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
