"""How a run is stopped from outside: Ctrl-C, or the SIGTERM by which schedulers and `kill` ask."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fewstep.progress import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first signal into a request to stop at the end of the round, and says so; a second one stops at once."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        with suppress(OSError, RuntimeError):  # a terminal that is gone, or in the midst of a line, costs no checkpoint
            say("stopping after this round; again to stop at once")

    try:
        for number in SIGNALS:
            signal.signal(number, ask)
    except ValueError:  # not the main thread: leave signals alone
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
