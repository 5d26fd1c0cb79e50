"""Stateless randomness: every draw of a run depends on (seed, rank, step, turn) alone, so resuming needs no generator state."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


def _seed(*key: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Stream:
    """A named source of draws. Times and indices come from the CPU (they steer), noise from the device it is used on."""

    key: tuple[int | str, ...]
    device: str = "cpu"
    _host: torch.Generator = field(init=False, repr=False, compare=False)
    _noise: torch.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_host", torch.Generator().manual_seed(_seed(*self.key, "host")))
        object.__setattr__(self, "_noise", torch.Generator(self.device).manual_seed(_seed(*self.key, "noise")))

    @cached_property
    def shared(self) -> Stream:
        """The stream of the same turn on which all processes agree; it goes on where it was left."""
        return Stream((self.key[0], "shared", *self.key[2:]), self.device)

    def child(self, name: int | str) -> Stream:
        """An independent stream, whatever has been drawn from this one."""
        return Stream((*self.key, name), self.device)

    def normal(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal noise on the stream's device."""
        return torch.randn(shape, generator=self._noise, device=self.device, dtype=dtype)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal noise of the shape and dtype of x."""
        return self.normal(x.shape, x.dtype)

    def uniform(self, n: int) -> Tensor:
        """n uniform numbers in [0, 1), float64, on the CPU."""
        return torch.rand(n, generator=self._host, dtype=torch.float64)

    def gaussian(self, n: int) -> Tensor:
        """n standard normal numbers, float64, on the CPU."""
        return torch.randn(n, generator=self._host, dtype=torch.float64)

    def integers(self, high: int, n: int) -> Tensor:
        """n integers in [0, high), on the CPU."""
        return torch.randint(high, (n,), generator=self._host)

    def integer(self, high: int) -> int:
        """One integer in [0, high)."""
        return int(self.integers(high, 1))


def stream(seed: int, rank: int, step: int, turn: int | str, device: str = "cpu") -> Stream:
    """The stream of one turn of one round on one process."""
    return Stream((seed, rank, step, turn), device)


@dataclass(frozen=True)
class Rows:
    """One stream a sample, so that picture i of a seed is the same in whatever batch it is drawn."""

    streams: tuple[Stream, ...]

    @property
    def generators(self) -> list[torch.Generator]:
        """Where the rows come from: a stock pipeline that is given these draws the same noise."""
        return [s._noise for s in self.streams]

    def normal(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal noise (B, *S), row i from stream i."""
        return torch.stack([s.normal(tuple(shape[1:]), dtype) for s in self.streams])

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal noise of the shape and dtype of x, where x is."""
        return self.normal(x.shape, x.dtype).to(x.device)


def rows(seed: int, start: int, stop: int) -> Rows:
    """The streams of samples start..stop-1 of a seed, on the CPU, so that a picture is the same wherever it is drawn."""
    return Rows(tuple(Stream((seed, "sample", i)) for i in range(start, stop)))
