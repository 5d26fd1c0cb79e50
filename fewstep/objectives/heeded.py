"""Settings of a wrapper with heads that nothing would read, as its others are, are refused where a config is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from fewstep.heads import KINDS


def check_heeded(wrapper: Any, heads: str, *, trained: bool, shares: bool) -> None:
    """Raises ValueError for a setting of `wrapper` that is not its default and would change nothing.

    heads: a key of KINDS. trained: its inner objective trains them itself. shares: they read the critic's own passes."""
    defaults = {f.name: f.default for f in fields(wrapper)}
    for name, why in _idle(heads, trained, shares):
        if getattr(wrapper, name) != defaults[name]:
            raise ValueError(f"{name} would change nothing: {why}; leave it away")


def _idle(heads: str, trained: bool, shares: bool) -> Iterator[tuple[str, str]]:
    """Settings that nothing reads, and why."""
    backbone, times = KINDS[heads].backbone, ("low", "high", "shift")
    if trained:
        yield "judge_weight", "inner trains its heads itself, by its own judge_weight"
    if backbone == "pixels":
        yield from ((name, "pixels are judged without noise") for name in (*times, "paired"))
    else:
        yield "features", f"{heads} heads listen to a denoiser, and only those of kind pixel to a network of their own"
    if backbone != "critic":
        yield "shared", f"{heads} heads take passes of their own"
    elif shares:
        why = "the critic's times are the heads' where they share its pass (shared: false parts them)"
        yield from ((name, why) for name in times)
