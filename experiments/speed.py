"""Times on an idle machine: decoding and reading, decoding with memories, and edits by length."""

from pathlib import Path

from experiments.erase import summarize
from experiments.indexmem import MEMORIES, OURS
from experiments.runner import Out, choose_folder, time_in
from vestige.cli.options import Dtype

METHODS = "learned,shift,drop,repair,blend,erratum"


def measure_speed(out: Out = None) -> None:
    """Time reading and decoding with snapkv and with kvpress's, after 2,000 and 8,000 tokens."""
    folder = choose_folder(out, "speed")
    peer = ("--peer", "kvpress:SnapKVPress")
    time_in(folder / "2000", "speed", "--length", "2000", "--batch", "1,4", "--budget", "0.25,0.05", *peer)
    time_in(folder / "8000", "speed", "--length", "8000", "--budget", "0.05", *peer, "--prefills", "2")


def measure_memories(out: Out = None, dtype: Dtype = None) -> None:
    """Time decoding after 4,000 tokens with each memory, at equal bytes."""
    budget = "18MB" if dtype == "float32" else "9MB"
    options = ["--length", "4000", "--budget", budget, "--policy", OURS, "--memory", ",".join(MEMORIES)]
    options += ["--blocks", "5", "--prefills", "1", *(("--dtype", dtype) if dtype else ())]
    time_in(choose_folder(out, "indexmem-speed", results="indexmem/speed"), "speed", *options)


def measure_edits(out: Out = None) -> None:
    """Time edits by length, and write the report of all erasers with them."""
    folder: Path = choose_folder(out, "erase-speed", results="erase")
    time_in(folder, "erase-speed", "--method", METHODS, "--rounds", "11")
    summarize(folder)
