"""Run an experiment by its name: ``python -m experiments NAME [OPTIONS]``; without a name, list them."""

import sys
from collections.abc import Sequence
from importlib import import_module

import typer

from vestige.errors import VestigeError, unknown_name_message

EXPERIMENTS = {
    "bench": ("bench:main", "our methods, kvpress's and transformers' caches on RULER tasks"),
    "speed": ("speed:measure_speed", "time of reading and decoding, beside kvpress"),
    "laprox": ("laprox:main", "LaProx beside the methods of its paper"),
    "memory": ("memory:main", "the gain of a memory of evicted pairs, at 4K to 8K tokens"),
    "retention": ("retention:main", "retention gates beside the field, at equal bytes"),
    "gates": ("ablations:main", "gates trained in eight ways, side by side"),
    "dilution": ("distractor_attention:main", "eviction against the full cache among distractors"),
    "indexmem": ("indexmem:main", "IndexMem beside the field, and the gain of each memory"),
    "indexmem-speed": ("speed:measure_memories", "time of decoding with each memory"),
    "restored": ("memory_restoration:main", "the part of attention that each memory restores"),
    "erase": ("erase:main", "erasers side by side"),
    "erase-speed": ("speed:measure_edits", "time of an edit by length"),
}
"""Function and contents of each experiment."""
USAGE = "Usage: python -m experiments NAME [OPTIONS]\nOptions of one: python -m experiments NAME --help\n"


def main(words: Sequence[str]) -> None:
    """Run an experiment; bad input is one line on stderr and exit status 2.

    Args:
        words: The name of the experiment and its options.
    """
    if not words or words[0] == "--help":
        return print("\n".join([USAGE, *(f"{name:<16}{line}" for name, (_, line) in EXPERIMENTS.items())]))
    name, *options = words
    try:
        if name not in EXPERIMENTS:
            raise VestigeError(unknown_name_message("experiment", name, EXPERIMENTS))
        module, _, function = EXPERIMENTS[name][0].partition(":")
        app = typer.Typer(add_completion=False)
        app.command()(getattr(import_module(f"experiments.{module}"), function))
        app(args=options, prog_name=f"python -m experiments {name}")
    except VestigeError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
