"""The interface of peers, and their error."""

from abc import abstractmethod
from contextlib import AbstractContextManager

from vestige.bench.methods.conversation import Job, Outcome
from vestige.errors import VestigeError


class PeerError(VestigeError, RuntimeError):
    """Another project's code failed, hung or cannot run the job."""


class Peer(AbstractContextManager["Peer"]):
    """A method of another project, measured like vestige's own. Use it with ``with``, or close it."""

    @abstractmethod
    def run(self, job: Job) -> Outcome:
        """Run one conversation.

        Raises:
            PeerError: The peer failed; it can run the next job.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the peer's resources; a second call does nothing."""

    def __exit__(self, *error: object) -> None:
        self.close()
