"""Wall time of a call, honestly: warmed up, synchronised, in quantiles."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch


def measure(
    call: Callable[[], object], *, warmup: int = 2, repeats: int = 5, sync: Callable[[], None] | None = None
) -> dict[str, float]:
    """p50_ms, p90_ms, mean_ms, warmup and repeats of a call without arguments.

    sync: what waits for the device; without it, torch.cuda.synchronize once the process uses a GPU. Raises ValueError for no
    warm-up (the first call compiles and allocates) or no repeat.
    """
    if warmup < 1 or repeats < 1:
        raise ValueError(f"a timing needs at least one warm-up and one repeat, not {warmup} and {repeats}")
    for _ in range(warmup):
        call()
    wait = sync or (torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None)
    times = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        call()
        wait()
        times.append(1000 * (time.perf_counter() - began))
    p50, p90 = np.quantile(times, [0.5, 0.9])
    return {"p50_ms": float(p50), "p90_ms": float(p90), "mean_ms": float(np.mean(times)), "warmup": warmup, "repeats": repeats}


def throughput(
    call: Callable[[], object], samples: int, *, warmup: int = 2, repeats: int = 5, sync: Callable[[], None] | None = None
) -> float:
    """Samples a second of a call that makes `samples` of them, at its median time."""
    return 1000 * samples / measure(call, warmup=warmup, repeats=repeats, sync=sync)["p50_ms"]
