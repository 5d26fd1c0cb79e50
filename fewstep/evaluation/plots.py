"""Plots of the report as PNG bytes, legible on light and dark pages. matplotlib loads on first use."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

_INK = "#808890"  # in the middle: seen on white and on near-black
_COLOURS = {"teacher": "#e0862d", "student": "#2f7fd1"}
_MORE = ("#2f7fd1", "#2aa198", "#b0529a", "#7a8f2a", "#c94f4f", "#6b6fd0")
_X = ("round", "step")
_NOT_CURVES = {"round", "step", "time", "seconds", "cpu_seconds", "epoch", "lr"}
_MOST_PANELS = 8


def quality(rows: Sequence[Mapping[str, Any]], floor: float | None = None) -> bytes | None:
    """Frechet distance (log) against steps, one line a model; a dashed floor where known. None if no row has both."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.get("fd", 0) > 0 and "steps" in row:
            lines.setdefault(row.get("name") or row["model"], []).append((row["steps"], row["fd"]))
    if not lines:
        return None
    figure, axes = _figure(1, 6.4, 3.6)
    axis = axes[0]
    spare = iter(_MORE[1:] * len(lines))
    for name, points in lines.items():
        steps, values = zip(*sorted(points), strict=True)
        axis.plot(steps, values, "o-", label=name, color=_COLOURS.get(name) or next(spare), linewidth=2)
    if floor:
        axis.axhline(floor, color=_INK, linestyle="--", linewidth=1, label="floor: true drawings")
    ticks = sorted({step for points in lines.values() for step, _ in points})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.set_xlabel("sampling steps")
    axis.set_ylabel("Fréchet distance (log)")
    _legend(axis)
    return _png(figure)


def losses(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes | None:
    """One panel a logged quantity (those that are losses, if any is), one line a run. None if nothing was logged."""
    names = list(dict.fromkeys(k for records in curves.values() for r in records for k, v in r.items() if _is_curve(k, v)))
    names = ([n for n in names if "loss" in n.lower()] or names)[:_MOST_PANELS]
    if not names:
        return None
    figure, axes = _figure(len(names), 4.2, 2.6)
    for axis, name in zip(axes, names, strict=True):
        for colour, (run, records) in zip(_MORE * len(curves), curves.items(), strict=False):
            points = [(_at(i, r), r[name]) for i, r in enumerate(records) if _is_curve(name, r.get(name))]
            if points:
                axis.plot(*zip(*points, strict=True), label=run, color=colour, linewidth=1.5)
        axis.set_title(name, color=_INK, fontsize=10)
        axis.set_xlabel("round")
    _legend(axes[0])
    return _png(figure)


def _is_curve(name: str, value: Any) -> bool:
    return name not in _NOT_CURVES and isinstance(value, int | float) and not isinstance(value, bool)


def _at(index: int, record: Mapping[str, Any]) -> float:
    return next((record[x] for x in _X if x in record), index)


def _figure(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: it keeps global state, and picks a window system

    columns = min(panels, 2)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    for axis in axes[:panels]:
        axis.patch.set_alpha(0)
        axis.grid(color=_INK, alpha=0.2, linewidth=0.7)
        axis.tick_params(which="both", colors=_INK)
        axis.xaxis.label.set_color(_INK)
        axis.yaxis.label.set_color(_INK)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
    return figure, axes[:panels]


def _legend(axis: Any) -> None:
    axis.legend(frameon=False, labelcolor=_INK, fontsize=9)


def _png(figure: Any) -> bytes:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=144)
    return held.getvalue()
