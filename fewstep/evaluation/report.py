"""The report: one HTML page that holds its own pictures and needs no script."""

from __future__ import annotations

import base64
import importlib.util
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fewstep import __version__
from fewstep.evaluation import plots
from fewstep.evaluation.results import SAME

# key: (heading, decimals, +1 if more is better, -1 if less is, 0 if neither)
_COLUMNS = {
    "fd": ("FD ↓", 3, -1),
    "kid": ("KID ↓", 4, -1),
    "precision": ("precision ↑", 3, 1),
    "recall": ("recall ↑", 3, 1),
    "density": ("density", 3, 0),  # above 1 is not better: samples crowd the modes
    "coverage": ("coverage ↑", 3, 1),
    "clip": ("CLIP ↑", 2, 1),
    "accuracy": ("accuracy ↑", 3, 1),
    "latency_ms": ("latency, ms ↓", 1, -1),
    "duplicates": ("duplicates ↓", 3, -1),
    "saturated": ("saturated", 3, 0),
    "n": ("n", 0, 0),
}
_ROW_NAMES = {"model", "steps", "name", "kid_stderr"}
_MARK = "Written by fewstep"  # in the footer
_PNG = b"\x89PNG\r\n\x1a\n"


def write_report(
    path: str | Path,
    *,
    results: Sequence[Mapping[str, Any]],
    grids: Sequence[tuple[str, str | Path]] = (),
    curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    notes: Sequence[str] = (),
    title: str = "fewstep report",
) -> Path:
    """Writes the page: a table and a quality-versus-steps plot a protocol, grids, training curves; returns its path.

    results: what `results.read` gives; curves: name to records of a metrics.jsonl; notes: lines that stand above all. Rows of
    unlike protocols get tables of their own. Without matplotlib the plots are left out. Raises ValueError for a grid that is no
    PNG file, and as `check_page` does.
    """
    path = Path(path)
    check_page(path)
    from jinja2 import Environment, StrictUndefined

    can_plot = importlib.util.find_spec("matplotlib") is not None
    by_protocol: dict[tuple, list[Mapping[str, Any]]] = {}
    for one in results:
        by_protocol.setdefault(tuple(one["protocol"].get(key) for key in SAME), []).append(one)
    # select_autoescape goes by file name: prompts and run names reach this page, so it is on without asking
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        (Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8")
    )
    text = page.render(
        title=title,
        notes=notes,
        tables=[_table(group, can_plot) for group in by_protocol.values()],
        grids=[{"title": name, "data": _embed(_read_png(file))} for name, file in grids],
        losses=_embed(plots.losses(curves)) if curves and can_plot else None,
        runs=", ".join(curves or ()),
        plots=can_plot,
        mark=f"{_MARK} {__version__}",
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path


def check_page(path: Path) -> None:
    """Raises ValueError where a page would go over what is no report of ours."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the page with --out, as in {path / 'report.html'}")
    if path.exists() and _MARK.encode() not in path.read_bytes():
        raise ValueError(f"{path} is there and is no report of fewstep; name another place with --out")


def _table(group: list[Mapping[str, Any]], can_plot: bool) -> dict[str, Any]:
    protocol = group[0]["protocol"]
    rows: list[Mapping[str, Any]] = []
    for one in group:
        rows += [row for row in one["rows"] if row not in rows]
    rows.sort(key=lambda r: (r["model"] != "teacher", str(r.get("name", "")), r.get("steps", 0)))
    known = [k for k in _COLUMNS if any(k in r for r in rows)]
    other = [k for k in dict.fromkeys(k for r in rows for k in r) if k not in _COLUMNS and k not in _ROW_NAMES]
    keys = known + other
    best = {k: _best([r[k] for r in rows if r["model"] == "student" and k in r], _COLUMNS[k][2]) for k in known}
    shown = [
        {
            "model": row["model"],
            "label": " ".join(filter(None, [row["model"], row.get("name")]))
            + (f", {row['steps']} step" + "s" * (row["steps"] != 1) if "steps" in row else ""),
            "cells": [
                {"text": _text(k, row), "best": row["model"] == "student" and k in row and row[k] == best.get(k)} for k in keys
            ],
        }
        for row in rows
    ]
    facts = [(k, v) for source in (protocol, group[0].get("environment", {})) for k, v in source.items() if v is not None]
    return {
        "name": protocol.get("name", ""),
        "hash": protocol["hash"],
        "heads": ["model"] + [_COLUMNS[k][0] if k in _COLUMNS else k for k in keys],
        "rows": shown,
        "facts": facts,
        "plot": _embed(plots.quality(rows, protocol.get("fd_floor"))) if can_plot else None,
    }


def _best(values: list[float], direction: int) -> float | None:
    return (max if direction > 0 else min)(values) if direction and len(values) > 1 else None


def _text(key: str, row: Mapping[str, Any]) -> str:
    value = row.get(key)
    if value is None:
        return "–"
    if key == "kid":
        error = f" ± {row['kid_stderr']:.2g}" if "kid_stderr" in row else ""
        return f"{value:.4g}{error}"  # of one extractor thousands, of another thousandths
    if isinstance(value, float):
        return f"{value:.{_COLUMNS[key][1]}f}" if key in _COLUMNS else f"{value:.4g}"
    return str(value)


def _embed(png: bytes | None) -> str | None:
    return None if png is None else base64.b64encode(png).decode()


def _read_png(file: str | Path) -> bytes:
    data = Path(file).read_bytes() if Path(file).is_file() else b""
    if not data.startswith(_PNG):
        raise ValueError(f"{file} is no PNG file; a report embeds the grids that a run wrote")
    return data
