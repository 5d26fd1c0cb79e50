"""Streams for tests: expectations without sampling noise, draws in float64, and several processes of one run."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fewstep.stream import Stream

T = TypeVar("T")


@dataclass
class Quadrature:
    """A Stream that draws the nodes of Gauss and Hermite's rule: a weighted sum over its batch is the expectation, exactly, for
    polynomials of degree below 2 nodes - 1 in each draw."""

    num_draws: int
    num_nodes: int = 6
    k: int = 0
    drawn: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        z, w = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(self.num_nodes))
        self.nodes = torch.cartesian_prod(*[z] * self.num_draws).reshape(-1, self.num_draws)
        self.weights = torch.cartesian_prod(*[w / w.sum()] * self.num_draws).reshape(-1, self.num_draws).prod(1)

    @property
    def shared(self) -> "Quadrature":
        return self

    def __len__(self) -> int:
        return len(self.weights)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        self.drawn += 1
        return self.nodes[:, self.drawn - 1].reshape(tuple(shape))

    def normal_like(self, x: Tensor) -> Tensor:
        return self.normal(x.shape)

    def uniform(self, n: int) -> Tensor:
        return torch.full((n,), 0.5, dtype=torch.float64)

    def integer(self, high: int) -> int:
        return self.k

    def mean(self, term: Tensor) -> Tensor:
        """The expectation of a per-sample term (B,)."""
        return (self.weights * term).sum()


class Double:
    """A stream whose noise is float64, and whose walks have a given length, or by default the longest."""

    def __init__(self, rng: Stream, length: int | None = None) -> None:
        self.rng, self.length = rng, length

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rng, name)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        return self.rng.normal(shape, torch.float64)

    @property
    def shared(self) -> "Double":
        return self

    def integer(self, high: int) -> int:
        return high - 1 if self.length is None else self.length


@dataclass(frozen=True)
class Joined:
    """A Stream in float64 that draws what several processes draw, each for n samples, end to end: one process's draws for all of
    their samples. A draw for k batches at once has its k parts joined apart."""

    streams: tuple[Stream, ...]
    n: int

    @cached_property
    def shared(self) -> Stream:
        return self.streams[0].shared  # the same one on every process

    def child(self, name: int | str) -> "Joined":
        return Joined(tuple(s.child(name) for s in self.streams), self.n)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        return self._joined(lambda s, n: s.normal((n, *shape[1:]), torch.float64), shape[0])

    def normal_like(self, x: Tensor) -> Tensor:
        return self.normal(x.shape)

    def uniform(self, n: int) -> Tensor:
        return self._joined(Stream.uniform, n)

    def gaussian(self, n: int) -> Tensor:
        return self._joined(Stream.gaussian, n)

    def integers(self, high: int, n: int) -> Tensor:
        return self._joined(lambda s, n: s.integers(high, n), n)

    def _joined(self, draw: Callable[[Stream, int], Tensor], n: int) -> Tensor:
        each = n // len(self.streams)
        parts = [draw(s, each).unflatten(0, (-1, min(self.n, each))) for s in self.streams]
        return torch.cat(parts, 1).flatten(0, 1)


def side_by_side(run: Callable[[int, Callable[[Tensor], Tensor]], T], n: int = 2) -> list[T]:
    """What n processes find that run at once: `run(rank, everywhere)`, with `Nets.everywhere` as the mean over all of them."""
    said: list[list[Tensor]] = [[] for _ in range(n)]
    barrier, turn = threading.Barrier(n, timeout=60), threading.Lock()  # one at a time, since they share their networks

    def process(rank: int) -> T:
        def everywhere(x: Tensor) -> Tensor:
            said[rank].append(x.detach())
            turn.release()
            barrier.wait()
            turn.acquire()
            return torch.stack([one[len(said[rank]) - 1] for one in said]).mean(0)

        with turn:
            return run(rank, everywhere)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(process, range(n)))
