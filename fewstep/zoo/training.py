"""One loop that trains every network of the zoo: AdamW, warm-up and cosine decay, seeded by step, resumable."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fewstep.progress import track

Loss = Callable[[int, torch.Generator], torch.Tensor]


def train(
    name: str,
    module: torch.nn.Module,
    loss: Loss,
    *,
    folder: Path,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    warmup: int = 100,
    average: float = 0.0,
    clip: float = 1.0,
) -> torch.nn.Module:
    """Minimises `loss(step, rng)` over the parameters of `module` and returns it in eval mode.

    average: decay of an exponential moving average of the weights, returned in place of the last ones (0: none).
    A file `folder/name.safetensors` is written every 500 steps and at the end; a finished or interrupted run continues from it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.safetensors"
    weights = {k: p for k, p in module.named_parameters() if p.requires_grad}
    mean = {k: p.detach().clone() for k, p in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    start = _resume(file, module, weights, mean, optimizer) if file.exists() else 0
    bar = track(range(start, steps), name, steps, start=start)
    module.train()
    running, began = 0.0, time.time()
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        value = loss(step, torch.Generator().manual_seed(_seed(name, step)))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), clip)
        optimizer.step()
        if average:
            decay = min(average, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(mean.values()), list(weights.values()), 1 - decay)
        running = 0.98 * running + 0.02 * float(value.detach())
        if step % 50 == 0:
            bar.note = f"loss {running / (1 - 0.98 ** (step - start + 1)):.4f}"
        if (step + 1) % 500 == 0 or step + 1 == steps:
            _save(file, step + 1, module, weights, mean, optimizer)
    if start < steps:
        print(f"{name}: {steps} steps, {time.time() - began:.0f} s, loss {running:.5f}", flush=True)
    if average:
        with torch.no_grad():
            for k, p in weights.items():
                p.copy_(mean[k])
    return module.eval()


def _seed(name: str, step: int) -> int:
    """A seed that depends on (name, step) alone."""
    return (sum(ord(c) * 131**i for i, c in enumerate(name)) * 1_000_003 + step) % (2**62)


def _save(file: Path, step: int, module, weights, mean, optimizer) -> None:
    tensors = {f"module.{k}": v.contiguous() for k, v in module.state_dict().items()}
    tensors |= {f"mean.{k}": v for k, v in mean.items()}
    for k, p in weights.items():
        tensors |= {f"adam.{k}.{key}": torch.as_tensor(v).clone() for key, v in optimizer.state[p].items()}
    scratch = file.with_suffix(".tmp")
    save_file({k: v.detach().clone() for k, v in tensors.items()}, scratch, metadata={"step": str(step)})
    os.replace(scratch, file)


def _resume(file: Path, module, weights, mean, optimizer) -> int:
    from safetensors import safe_open

    tensors = load_file(file)
    with safe_open(file, "pt") as f:
        step = int(f.metadata()["step"])
    module.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("module.")})
    for k, p in weights.items():
        mean[k].copy_(tensors[f"mean.{k}"])
        if f"adam.{k}.step" in tensors:  # a weight that no gradient reaches has no state
            optimizer.state[p] = {key: tensors[f"adam.{k}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return step
