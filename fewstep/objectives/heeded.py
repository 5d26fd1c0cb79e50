"""What a wrapper with heads cannot wrap, and settings of it that nothing would read, are refused where a config is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from fewstep.heads import KINDS, Heads
from fewstep.objectives.base import Objective


def check_inner(inner: Objective, told: Heads, loss: str) -> None:
    """Raises ValueError for an objective that adversarial's heads have no place in. told: the heads of its settings."""
    needs = inner.needs
    if any("heads" in turn.movers for turn in inner.round(0)):
        raise ValueError("inner: it trains heads of its own, whose weight is among its settings; leave adversarial away")
    if "heads" in needs.roles and told not in (Heads(), needs.heads):
        raise ValueError("inner: it says itself which heads it needs; leave heads, taps and features of adversarial away")
    if "heads" in needs.roles and loss != "non_saturating":
        raise ValueError(f"loss: inner reads its heads' logit as a log ratio, which {loss} does not make; leave it away")


def check_heeded(wrapper: Any, inner: Objective, heads: str, *, shares: bool) -> None:
    """Raises ValueError for a setting of `wrapper` that is not its default and would change nothing.

    heads: a key of KINDS. shares: whether they judge by the critic's own passes."""
    defaults = {f.name: f.default for f in fields(wrapper)}
    for name, why in _idle(heads, inner.audible, shares and "critic" in inner.needs.roles):
        if getattr(wrapper, name) != defaults[name]:
            raise ValueError(f"{name} would change nothing: {why}; leave it away")


def _idle(heads: str, audible: bool, timed: bool) -> Iterator[tuple[str, str]]:
    """Settings that nothing reads, and why. timed: the inner objective's critic says at which times heads judge."""
    backbone, times = KINDS[heads].backbone, ("low", "high", "shift")
    if backbone == "pixels":
        yield from ((name, "pixels are judged without noise") for name in (*times, "paired"))
    else:
        yield "features", f"{heads} heads listen to a denoiser, and only those of kind pixel to a network of their own"
    if backbone != "critic":
        yield "shared", f"{heads} heads take passes of their own"
    elif not audible:
        yield "shared", "inner's critic is guided, and heads take passes of their own"
    elif timed:
        why = "the critic's times are the heads' where they share its pass (shared: false parts them)"
        yield from ((name, why) for name in times)
