"""Other projects' methods, run and measured like our own: kvpress's presses and transformers' caches."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vestige.bench.methods.peers.base import Peer, PeerError
from vestige.bench.methods.peers.names import AVAILABLE, parse
from vestige.budget import Budget
from vestige.cache.state import expected_footprint
from vestige.models.layout import check as anatomy_of

__all__ = [
    "AVAILABLE",
    "OpenPeers",
    "Peer",
    "PeerError",
    "check",
    "open_peer",
    "pairs_to_keep",
    "takes_budget",
]


def check(name: str) -> None:
    """Raise an InputError if a name does not have the shape of a peer's name."""
    parse(name)


def takes_budget(name: str) -> bool:
    """Return whether a peer evicts to a budget; if not, it runs once, as budget "1.0"."""
    return parse(name).kind == "kvpress"


def pairs_to_keep(name: str, budget: str, model: Any, *, seen: int, length: int) -> int | None:
    """Return how many pairs a row a peer may keep: as many as our own arms at this budget; None if it takes none.

    Args:
        name: The peer's.
        budget: As the user wrote it.
        model: What a budget in bytes is judged by.
        seen: Tokens that are read before it compresses.
        length: Tokens of context and question, which a fraction is one of.
    """
    if not takes_budget(name):
        return None
    weighs = expected_footprint(anatomy_of(model))
    return Budget.parse(budget).pairs(seen=seen, length=length, protected=0, footprint=weighs)


class OpenPeers(ExitStack):
    """Peers on one model, each opened when it is first called for, all closed together."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._known: dict[str, Peer] = {}

    def __call__(self, name: str) -> Peer:
        """Return the peer of this name, ready to run jobs; raises as :func:`open_peer`."""
        if name not in self._known:
            self._known[name] = self.enter_context(open_peer(name, model=self.model))
        return self._known[name]


def open_peer(name: str, *, model: Any, folder: Path | str | None = None, timeout_s: float | int = 3600.0) -> Peer:
    """Return a peer that is ready to run jobs. Close it, or use it with ``with``.

    Presses that are open at the same time share one process, which loads the model once, at the first job.

    Args:
        name: See :func:`check`.
        model: Runs the caches of transformers itself, attached or not; for presses it says what to load.
        folder: Where kvpress loads the model from; None is where this one was loaded from, the hub's cache included.
        timeout_s: Seconds that one job of kvpress may take, loading included.

    Raises:
        InputError: The name cannot be read, or a package or folder that it needs is absent; with what to do.
    """
    parsed = parse(name)
    if parsed.kind == "transformers":
        from vestige.bench.methods.peers.caches import CachePeer

        return CachePeer(parsed, model)
    from vestige.bench.methods.peers.presses import PressPeer, Source

    home = model.name_or_path if folder is None else folder
    source = Source.of(home, model.device, model.dtype)
    return PressPeer(parsed, source, timeout_s)
