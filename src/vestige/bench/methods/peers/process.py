"""A worker process that answers JSON lines: started when needed, started again after a death, never left behind."""

import json
import os
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from vestige.bench.methods.peers.base import PeerError

_GRACE_S = 5.0
_LAST_WORDS = 3


class Worker:
    """One process behind a pipe, and how to make it ready.

    Args:
        name: What errors call it.
        command: What to run; it reads requests on stdin and answers on stdout, one JSON object a line.
        hello: The first request of each life, without ``id``.
        timeout_s: Seconds that one answer may take.
        environment: Variables that differ from this process's; None removes one.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        hello: dict[str, Any],
        *,
        timeout_s: float | int = 3600.0,
        environment: dict[str, str | None] | None = None,
    ) -> None:
        self.name, self.command, self.hello, self.timeout_s = name, list(command), hello, timeout_s
        changed: dict[str, str | None] = {**os.environ, **(environment or {})}
        self.environment = {key: value for key, value in changed.items() if value is not None}
        self.process: subprocess.Popen[str] | None = None
        self._asked = 0

    def ask(self, request: dict[str, Any], *, timeout_s: float | int | None = None) -> Any:
        """Send a request and return its result. After an error of any kind the worker can be asked again.

        Raises:
            PeerError: The worker died, was silent for too long, wrote something else, or answered with an error; with
                the last lines it wrote to stderr.
        """
        patience = self.timeout_s if timeout_s is None else timeout_s
        if self.process is None:
            self._start()
            self._ask(self.hello, patience)
        return self._ask(request, patience)

    def close(self) -> None:
        """End the process, at once if it is busy. It is started again if asked."""
        process, self.process = self.process, None
        if process is None:
            return
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for thread in self._threads:
            thread.join(_GRACE_S)

    def _start(self) -> None:
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(
                self.command,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env=self.environment,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise PeerError(f"{self.name} cannot be started: {error}") from None
        assert process.stdout is not None and process.stderr is not None
        self.process = process
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._words: deque[str] = deque(maxlen=_LAST_WORDS)
        self._threads = [
            threading.Thread(target=_pass_on, args=(process.stdout, self._answers), daemon=True),
            threading.Thread(target=_remember, args=(process.stderr, self._words), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, request: dict[str, Any], patience: float | int) -> Any:
        assert self.process is not None and self.process.stdin is not None
        self._asked += 1
        self._words.clear()  # what it said before is another story
        try:
            with suppress(OSError):  # if it is dead, the answer is the end of its output
                self.process.stdin.write(json.dumps({"id": self._asked, **request}) + "\n")
                self.process.stdin.flush()
            line = self._answers.get(timeout=patience)
        except queue.Empty:
            raise self._fatal(f"gave no answer in {patience:g} s") from None
        except BaseException:  # an interrupt: what it answers later would be taken for the next answer
            self._kill()
            raise
        if line is None:
            raise self._fatal("died")
        return self._result(line)

    def _result(self, line: str) -> Any:
        try:
            answer = json.loads(line)
            fits = answer["id"] == self._asked and ("result" in answer or isinstance(answer["error"], str))
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise self._fatal(f"wrote what is no answer: {line.strip()[:80]!r}")
        if "result" in answer:
            return answer["result"]
        raise PeerError(self._told(f"failed: {answer['error']}"))

    def _fatal(self, what: str) -> PeerError:
        """End the process and return the error that says why."""
        process = self.process
        self._kill()
        status = f" with status {process.returncode}" if what == "died" and process is not None else ""
        return PeerError(self._told(what + status))

    def _kill(self) -> None:
        process = self.process
        if process is not None and process.stdout is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)  # one that is dying says how
            process.kill()
        self.close()

    def _told(self, what: str) -> str:
        words = " | ".join(word for word in self._words if word)
        return " ".join(f"{self.name} {what}{f'; it said: {words}' if words else ''}".split())


def _pass_on(stream: Any, answers: "queue.SimpleQueue[str | None]") -> None:
    try:
        with stream:
            for line in stream:
                answers.put(line)
    finally:
        answers.put(None)


def _remember(stream: Any, words: deque[str]) -> None:
    with stream:
        for line in stream:
            words.append(line.strip())
