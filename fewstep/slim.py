"""A student of another shape than its teacher: the same class of network, built from the teacher's config with changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from fewstep.denoiser import Cond, Denoiser
from fewstep.experts import Relay
from fewstep.hints import hint


def body(net: Any, changes: Mapping[str, Any], seed: int) -> Any:
    """A float32 copy of a network; where `changes` says something, a network of its class whose config has these values in place
    of its own, on its device. It starts from a selection of the network's weights: of those of a name, evenly spaced entries
    along each axis, all of them where nothing is smaller, of layers the first (weight selection, arXiv 2311.18823); what has
    no counterpart is random, by the seed alone.

    Raises ValueError for a setting that the network does not have, or values that make none."""
    if not changes:
        return copy.deepcopy(net).float()
    if isinstance(net, Relay):
        raise ValueError("student.network: this teacher is two networks, of which no other shape can be made; leave it away")
    # Without _use_default_values, whose keys Diffusers would set back to its defaults.
    known = {key: value for key, value in net.config.items() if not key.startswith("_")}
    for key in changes:
        if key not in known:
            raise ValueError(f"student.network: {type(net).__name__} has no setting {key!r}{hint(key, known)}")
    device = next(net.parameters()).device
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
        torch.manual_seed(seed)
        try:
            made = type(net).from_config({**known, **changes})
        except (ValueError, TypeError, RuntimeError, IndexError, ZeroDivisionError) as error:
            raise ValueError(f"student.network: no {type(net).__name__} can be made with {dict(changes)}: {error}") from error
    return _selected(made.float().to(device), net).eval()


@torch.no_grad()
def _selected(made: Any, net: Any) -> Any:
    """`made`, whose weights are evenly spaced entries of those of `net` that have their names and are at least as large."""
    whole = net.state_dict()
    for name, weight in made.state_dict().items():
        source = whole.get(name)
        if source is None or source.ndim != weight.ndim or any(n > m for n, m in zip(weight.shape, source.shape, strict=True)):
            continue
        for axis, (n, m) in enumerate(zip(weight.shape, source.shape, strict=True)):
            if n < m:
                source = source.index_select(axis, torch.linspace(0, m - 1, n).round().long().to(source.device))
        weight.copy_(source)
    return made


@torch.no_grad()
def try_out(student: Denoiser, shape: tuple[int, ...], cond: Cond) -> None:
    """Raises ValueError where a student of another shape does not take latents (C, *S) and a condition (leading axis 1), or does
    not answer in their shape; so it is known before anything expensive is done."""
    x, t = torch.zeros(1, *shape), torch.full((1,), 0.5, dtype=torch.float64)
    try:
        found = student(x, t, cond).x0.shape
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"student.network: the student does not take what its teacher takes: {error}") from error
    if found != x.shape:
        raise ValueError(f"student.network: the student answers in the shape {list(found[1:])}, not {list(shape)}")
