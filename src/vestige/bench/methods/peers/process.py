"""A worker process that answers JSON lines. It starts when needed, and again after it died, and is always ended."""

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
_LAST_LINES = 3


class Worker:
    """A process with a pipe, and its command and first request.

    Args:
        name: The name in errors.
        command: The command; it reads requests on stdin and answers on stdout, one JSON object a line.
        load: The first request to each process, without ``id``.
        environment: Variables that differ from this process's; None removes one.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        load: dict[str, Any],
        environment: dict[str, str | None],
    ) -> None:
        self.name, self.command, self.load = name, list(command), load
        changed: dict[str, str | None] = {**os.environ, **environment}
        self.environment = {key: value for key, value in changed.items() if value is not None}
        self.process: subprocess.Popen[str] | None = None
        self._count = 0

    def ask(self, request: dict[str, Any], timeout_s: float | int) -> Any:
        """Send a request and return its result. After any error the worker takes further requests.

        Raises:
            PeerError: The worker died, was silent for too long, wrote something else, or answered with an error; with
                its last lines on stderr.
        """
        if self.process is None:
            self._start()
            self._ask(self.load, timeout_s)
        return self._ask(request, timeout_s)

    def close(self) -> None:
        """End the process, at once if it is busy. The next request starts it again."""
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
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._threads = [
            threading.Thread(target=_forward_lines, args=(process.stdout, self._answers), daemon=True),
            threading.Thread(target=_keep_last_lines, args=(process.stderr, self._last_lines), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, request: dict[str, Any], timeout: float | int) -> Any:
        assert self.process is not None and self.process.stdin is not None
        self._count += 1
        self._last_lines.clear()  # lines of earlier requests do not explain this one
        try:
            with suppress(OSError):  # if the process is dead, the end of its output is the answer
                self.process.stdin.write(json.dumps({"id": self._count, **request}) + "\n")
                self.process.stdin.flush()
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise self._end_with_error(f"gave no answer in {timeout:g} s") from None
        except BaseException:  # an interrupt: its late answer must not pass for the next one
            self._kill()
            raise
        if line is None:
            raise self._end_with_error("died")
        return self._result(line)

    def _result(self, line: str) -> Any:
        try:
            answer = json.loads(line)
            fits = answer["id"] == self._count and ("result" in answer or isinstance(answer["error"], str))
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise self._end_with_error(f"wrote what is no answer: {line.strip()[:80]!r}")
        if "result" in answer:
            return answer["result"]
        raise PeerError(self._describe(f"failed: {answer['error']}"))

    def _end_with_error(self, what: str) -> PeerError:
        """End the process and return the error with the reason."""
        process = self.process
        self._kill()
        status = f" with status {process.returncode}" if what == "died" and process is not None else ""
        return PeerError(self._describe(what + status))

    def _kill(self) -> None:
        process = self.process
        if process is not None and process.stdout is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)  # a dying process gets a status
            process.kill()
        self.close()

    def _describe(self, what: str) -> str:
        lines = " | ".join(line for line in self._last_lines if line)
        return " ".join(f"{self.name} {what}{f'; it said: {lines}' if lines else ''}".split())


def _forward_lines(stream: Any, answers: "queue.SimpleQueue[str | None]") -> None:
    try:
        with stream:
            for line in stream:
                answers.put(line)
    finally:
        answers.put(None)


def _keep_last_lines(stream: Any, lines: deque[str]) -> None:
    with stream:
        for line in stream:
            lines.append(line.strip())
