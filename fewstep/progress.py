"""Progress of long work, on stderr: a bar in a terminal, elsewhere a plain line now and then. Only the first process speaks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")
EVERY = 10.0  # seconds between two lines of a log


class Track(Generic[T]):
    """What `track` returns: the items, and a `note` to show behind the count, which the loop may set."""

    def __init__(self, items: Iterable[T], what: str, total: int, start: int, each: int, active: bool) -> None:
        self.items, self.what, self.total, self.start, self.each, self.active = items, what, total, start, each, active
        self.note = ""

    def __iter__(self) -> Iterator[T]:
        if not self.active:
            return iter(self.items)
        return self._bar() if sys.stderr.isatty() else self._lines()

    def _bar(self) -> Iterator[T]:
        with tqdm(desc=self.what, initial=self.start, total=self.total, mininterval=0.5) as bar:
            for item in self.items:
                yield item
                bar.set_postfix_str(self.note, refresh=False)
                bar.update(min(self.each, self.total - bar.n))

    def _lines(self) -> Iterator[T]:
        began = said = time.monotonic()
        done = self.start
        for item in self.items:
            yield item
            done = min(done + self.each, self.total)
            now = time.monotonic()
            if now - said >= EVERY or done == self.total:
                said, spent = now, max(now - began, 1e-9)
                rate = (done - self.start) / spent
                left = (
                    f"{tqdm.format_interval((self.total - done) / rate)} left"
                    if done < self.total
                    else f"in {tqdm.format_interval(spent)}"
                )
                parts = (f"{self.what}: {done}/{self.total}", f"{rate:.3g}/s", left, self.note)
                print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)


def track(items: Iterable[T], what: str, total: int, *, start: int = 0, each: int = 1, active: bool = True) -> Track[T]:
    """Iterates over items and shows how far that is: `each` counts an item for, up to `total`, from `start` on."""
    return Track(items, what, total, start, each, active and os.environ.get("RANK", "0") == "0")


def say(text: str) -> None:
    """One line among the progress, which a bar makes room for. Only the first process speaks."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr)
