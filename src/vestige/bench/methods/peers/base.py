"""What every peer is, and how one fails."""

from abc import ABC, abstractmethod
from types import TracebackType

from vestige.bench.methods.conversation import Job, Outcome
from vestige.errors import VestigeError


class PeerError(VestigeError, RuntimeError):
    """Another project's code failed, hung or cannot do what was asked."""


class Peer(ABC):
    """Another method, measured as ours are. Use it with ``with``, or close it."""

    @abstractmethod
    def run(self, job: Job) -> Outcome:
        """Hold one conversation.

        Raises:
            PeerError: The peer failed; it can be asked again.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of what it holds; closing twice does nothing."""

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
