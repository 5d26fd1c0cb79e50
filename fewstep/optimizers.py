"""Optimizers by the name a config has for them, what each remembers of a weight, and one step that may be left out."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Kind:
    """make: (weights, rate, betas, weight decay) -> optimizer; remembers: bytes of state for a weight of a shape."""

    make: Callable[[Sequence[nn.Parameter], float, tuple[float, float], float], torch.optim.Optimizer]
    remembers: Callable[[torch.Size], int]


def _adamw(weights: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=lr, betas=betas, weight_decay=decay, fused=True)


def _adamw8bit(weights: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], decay: float) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(weights, lr=lr, betas=betas, weight_decay=decay)


def _adafactor(weights: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], decay: float) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(weights, lr=lr, weight_decay=decay, foreach=False)  # no temporaries for all weights at once


def _eight_bit(shape: torch.Size) -> int:
    n = math.prod(shape)
    return 8 * n if n < 4096 else 2 * n + 2 * 4 * -(-n // 256)  # small ones stay float32; a scale for 256 numbers


def _factored(shape: torch.Size) -> int:
    n = math.prod(shape)
    return 4 + 4 * (n if len(shape) < 2 else n // shape[-1] + n // shape[-2])


KINDS = {
    "adamw": Kind(_adamw, lambda shape: 8 * math.prod(shape) + 4),
    "adamw8bit": Kind(_adamw8bit, _eight_bit),
    "adafactor": Kind(_adafactor, _factored),
}


def check_optimizer(name: str, cpu: bool) -> None:
    """Raises ValueError for an optimizer that does not work here."""
    if name != "adamw8bit":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("train.optimizer: adamw8bit needs bitsandbytes (pip install bitsandbytes); or set it to adafactor")
    if cpu:
        raise ValueError("train.optimizer: adamw8bit runs on CUDA devices alone; on the CPU set it to adafactor or adamw")


def step_unless(bad: Tensor, optimizer: Any, inner: torch.optim.Optimizer) -> None:
    """One step of an optimizer (inner: as it is when unwrapped), or none where bad () is 1. Fused ones are told on their device;
    others wait for the host to read it."""
    if inner.defaults.get("fused"):
        inner.found_inf, inner.grad_scale = bad, None  # type: ignore[attr-defined]
        optimizer.step()
    elif not bool(bad):
        optimizer.step()
