"""Other projects' methods, run and measured like our own: kvpress's presses and transformers' caches."""

from pathlib import Path
from typing import Any

from vestige.bench.peers.base import Peer, PeerError
from vestige.bench.peers.names import AVAILABLE, parse, split

__all__ = ["AVAILABLE", "Peer", "PeerError", "check", "open_peer", "split", "takes_budget"]


def check(name: str) -> None:
    """Raise an InputError if a name does not have the shape of a peer's name."""
    parse(name)


def takes_budget(name: str) -> bool:
    """Return whether a peer evicts to a budget; if not, it runs once, as budget "1.0"."""
    return parse(name).kind == "kvpress"


def open_peer(
    name: str,
    *,
    model: Any,
    folder: Path | str | None = None,
    device: Any = None,
    dtype: Any = None,
    timeout_s: float | int = 3600.0,
) -> Peer:
    """Return a peer that is ready to run jobs. Close it, or use it with ``with``.

    Presses that are open at the same time share one process, which loads the model once, at the first job.

    Args:
        name: See :func:`check`.
        model: Runs the caches of transformers itself, attached or not; for presses it says what to load.
        folder: Where kvpress loads the model from; None is where this one was loaded from, the hub's cache included.
        device: Where kvpress puts it; None is where this one is.
        dtype: Of its weights; None is that of this one.
        timeout_s: Seconds that one job of kvpress may take, loading included.

    Raises:
        InputError: The name cannot be read, or a package or folder that it needs is absent; with what to do.
    """
    parsed = parse(name)
    if parsed.kind == "transformers":
        from vestige.bench.peers.caches import CachePeer

        return CachePeer(parsed, model)
    from vestige.bench.peers.presses import PressPeer, Source

    home = model.name_or_path if folder is None else folder
    source = Source.of(home, device or model.device, dtype or model.dtype)
    return PressPeer(parsed, source, timeout_s)
