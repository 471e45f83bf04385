"""kvpress's presses as peers, in a process of their own: kvpress needs a transformers that vestige does not run on."""

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import snapshot_download

from vestige.bench.methods.conversation import Job, Outcome
from vestige.bench.methods.peers.base import Peer, PeerError
from vestige.bench.methods.peers.names import PeerName
from vestige.bench.methods.peers.process import Worker
from vestige.errors import InputError

_PYTHON = "VESTIGE_PEERS_PYTHON"
_SCRIPT = Path(__file__).parent.parent / "kvpress_worker.py"


@dataclass(frozen=True)
class Source:
    """The model that a worker loads, and its options."""

    python: str
    folder: str
    device: str
    dtype: str
    threads: int

    @classmethod
    def of(cls, home: Path | str, device: Any, dtype: Any) -> "Source":
        """Return the source of a folder, or of a hub id that is in transformers' cache.

        Raises:
            InputError: No peer environment, or no such model on this machine.
        """
        folder = Path(home) if Path(home).is_dir() else _find_folder(str(home))
        kind = str(dtype).removeprefix("torch.")
        return cls(find_python(), str(folder.absolute()), str(device), kind, torch.get_num_threads())


def find_python() -> str:
    """Return the Python of the peer environment.

    Raises:
        InputError: There is none; the message says how to make it.
    """
    named = os.environ.get(_PYTHON)
    inside = Path("Scripts", "python.exe") if sys.platform == "win32" else Path("bin", "python")
    homes = (Path.cwd(), *_SCRIPT.parents[4:5])  # the repository, when run from a checkout
    for python in [Path(named)] if named else [home / ".venv-peers" / inside for home in homes]:
        if python.is_file():
            return str(python.absolute())
    raise InputError(f"kvpress is not installed: run `make peers`, or set {_PYTHON}")


def _find_folder(name: str) -> Path:
    """Return the folder in which the hub's cache has a model."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or not a hub id
        raise InputError(f"kvpress loads the model from a folder, and {name!r} is none") from None


class PressPeer(Peer):
    """A press of kvpress. Open presses of one source share a process."""

    shared: ClassVar[dict[Source, tuple[Worker, set["PressPeer"]]]] = {}
    """The worker of each source, and its open presses."""

    def __init__(self, name: PeerName, source: Source, timeout_s: float | int) -> None:
        self.name, self.source, self.timeout_s = name, source, timeout_s
        _, users = self.shared.setdefault(source, (_make_worker(source), set()))
        users.add(self)

    def run(self, job: Job) -> Outcome:
        """Run one conversation. Only the first context is compressed, to ``job.keep`` pairs.

        Raises:
            PeerError: kvpress failed, or its process did; the next job starts another.
        """
        answer = self._ask({"op": "run", "press": self.name.call, "job": asdict(job)})
        try:
            return _read_outcome(answer)
        except (KeyError, TypeError, ValueError) as error:
            raise PeerError(f"{self.name.text} gave an answer that cannot be read: {error!r}") from None

    def find_kept(self, ids: tuple[int, ...], keep: int) -> list[list[list[int]]]:
        """Return the positions of a context that stay, by layer and KV head, to compare with vestige's policies."""
        found: list[list[list[int]]] = self._ask({"op": "kept", "press": self.name.call, "ids": ids, "keep": keep})
        return found

    def close(self) -> None:
        """Release the process, which ends with its last press."""
        worker, users = self.shared.get(self.source, (None, set()))
        users.discard(self)
        if worker is not None and not users:
            del self.shared[self.source]
            worker.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        worker, users = self.shared.get(self.source, (None, set()))
        if worker is None or self not in users:
            raise PeerError(f"{self.name.text} is closed")
        return worker.ask(request, self.timeout_s)


def _make_worker(source: Source) -> Worker:
    load = asdict(source) | {"op": "load"}
    del load["python"]
    environment = {
        "PYTHONPATH": None,
        "PYTHONHOME": None,
        "PYTHONSAFEPATH": "1",  # the script's neighbours must not shadow packages of the same name
        "OMP_NUM_THREADS": str(source.threads),
    }
    return Worker("kvpress", [source.python, str(_SCRIPT)], load, environment)


def _read_outcome(answer: Any) -> Outcome:
    counts = ("seen", "held", "full", "kv_bytes", "peak_kv_bytes", "full_kv_bytes")
    return Outcome(
        replies=tuple(tuple(int(token) for token in reply) for reply in answer["replies"]),
        prefill_s=float(answer["prefill_s"]),
        evict_s=float(answer["evict_s"]),
        decode_ms=None if answer["decode_ms"] is None else float(answer["decode_ms"]),
        kept=tuple(tuple(int(x) for x in row) for row in answer["kept"]),
        note=None if answer["note"] is None else str(answer["note"]),
        **{name: int(answer[name]) for name in counts},
    )
