"""Ctrl-C and SIGTERM as a question that a loop asks when it can stop without losing anything."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stopping:
    """While entered, the first Ctrl-C or SIGTERM sets ``asked``; the second one acts as it would have before.

    Outside the main thread, where Python handles no signals, it is never asked.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._ask) for one in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for one, before in self._before.items():
            signal.signal(one, before)
        self._before = {}
