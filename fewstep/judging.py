"""`fewstep eval` and `fewstep report`: a run, a pipeline folder or a folder of images becomes rows of numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.adapters import Teacher, load_teacher
from fewstep.api import Run
from fewstep.data import default_cache
from fewstep.denoiser import Denoiser, Guided
from fewstep.evaluation import images as folders
from fewstep.evaluation import latency, results
from fewstep.evaluation.protocol import Protocol, describe, floor, judge, load_prompts, load_protocol
from fewstep.evaluation.report import write_report
from fewstep.exported import Exported, is_export
from fewstep.painting import generate
from fewstep.stages import is_run, traces
from fewstep.zoo import HERE

TEACHER_STEPS = (50, 1, 2, 4)
CARD = "results.json"  # a zoo teacher's own measured rows, beside its weights


@dataclass(frozen=True)
class Row:
    """One line to be measured: who, in how many steps, and how pictures are drawn for prompts."""

    model: str
    steps: int
    draw: Callable[[list[str]], np.ndarray]


def evaluate(
    target: Path | str, protocol_name: str, *, out: Path | None, steps: list[int], fresh: bool, teacher: bool
) -> tuple[dict[str, Any], Path]:
    """Measures a target and writes results.json (beside it, or at `out`). Returns both.

    A teacher of the zoo brings its rows on its card, taken where protocol and extractor are the same and `fresh` is not asked."""
    protocol, target = load_protocol(protocol_name), Path(target)
    where = out or (target / CARD if target.is_dir() else Path(CARD))
    prompts = load_prompts(protocol)
    said = describe(protocol, cache=default_cache())
    rows, known = _rows(target, protocol, steps, teacher, None if fresh else said)
    measured = [*known, *(_measure(row, prompts, protocol) for row in rows)]
    found = results.new(measured, said | _floor(protocol))
    results.write(where, found)
    return found, where


def _rows(
    target: Path, protocol: Protocol, steps: list[int], teacher: bool, said: dict[str, Any] | None
) -> tuple[list[Row], list[dict[str, Any]]]:
    if is_run(target):
        run = Run(target)
        lines = _students(run, steps or run.study.steps(), protocol)
        if not teacher:
            return lines, []
        known = _card(run.study.teacher, run.study.guidance, said)
        missing = [n for n in TEACHER_STEPS if n not in {r["steps"] for r in known}]
        return [
            *(_guided(run.study.teacher, run.study.guided(run.study.roles["teacher"]), n, protocol) for n in missing),
            *lines,
        ], known
    if is_export(target):
        exported = Exported(target)
        return _students(exported, steps or exported.counts, protocol), []
    if str(target).startswith("zoo:") or (target / "model_index.json").exists():
        return [_plain(str(target), n, protocol) for n in (steps or TEACHER_STEPS)], []
    if target.is_dir():
        pictures = folders.load_folder(target)
        if len(pictures.images) < protocol.n:
            raise ValueError(f"{target} has {len(pictures.images)} images, protocol {protocol.name!r} judges {protocol.n}")
        return [Row("student", (steps or [1])[0], lambda prompts: pictures.images[: protocol.n])], []
    raise ValueError(f"{target} is neither a run, a Diffusers folder nor a folder of images; name one of these")


def _students(student: Run | Exported, steps: Sequence[int], protocol: Protocol) -> list[Row]:
    def row(n: int) -> Row:
        return Row("student", n, lambda prompts: student.sample(prompts, n, protocol.seed, bar=f"student, {n} steps"))

    return [row(n) for n in steps]


def _guided(teacher: Teacher, denoiser: Denoiser | Guided, n: int, protocol: Protocol) -> Row:
    def draw(prompts: list[str]) -> np.ndarray:
        times = teacher.grid(n, "ddim")
        return generate(teacher, denoiser, teacher.encode(prompts), times, "ddim", seed=protocol.seed, bar=f"teacher, {n} steps")

    return Row("teacher", n, draw)


def _plain(path: str, n: int, protocol: Protocol) -> Row:
    teacher = load_teacher(path)
    return _guided(teacher, teacher.guided(teacher.net), n, protocol)


def _card(teacher: Teacher, guidance: float, said: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A zoo teacher's stored rows, if they were measured as we would."""
    file = HERE / teacher.path.removeprefix("zoo:") / CARD
    if said is None or not teacher.path.startswith("zoo:") or not file.exists() or guidance != teacher.guidance:
        return []
    stored = results.read(file)
    same = all(stored["protocol"].get(k) == said[k] for k in ("hash", "extractor_id", "clip_id", "reference_sha256"))
    return [r for r in stored["rows"] if r["steps"] in TEACHER_STEPS] if same else []


def _measure(row: Row, prompts: list[str], protocol: Protocol) -> dict[str, Any]:
    images = row.draw(prompts)
    timing = latency.measure(lambda: row.draw(prompts[:1]), warmup=1, repeats=3)
    return {
        "model": row.model,
        "steps": row.steps,
        **judge(images, prompts, protocol, cache=default_cache()),
        "latency_ms": timing["p50_ms"],
    }


def _floor(protocol: Protocol) -> dict[str, Any]:
    return {"fd_floor": floor(protocol, cache=default_cache())} if protocol.reference == "zoo:sprites" else {}


def table(found: dict[str, Any]) -> str:
    """The rows for a terminal."""
    columns = ("model", "steps", "fd", "kid", "coverage", "clip", "accuracy", "latency_ms")
    lines = ["  ".join(f"{c:>10}" for c in columns)]
    for row in found["rows"]:
        cells = [row.get(c, "") for c in columns]
        lines.append("  ".join(f"{c:>10.4g}" if isinstance(c, float) else f"{c!s:>10}" for c in cells))
    return "\n".join(lines)


def report_runs(runs: list[Path], out: Path) -> Path:
    """One page for several run folders. Raises ValueError for a folder without results."""
    found, grids, curves = [], [], {}
    for folder in runs:
        if not (folder / CARD).exists():
            raise ValueError(f"{folder} has no {CARD}; `fewstep eval {folder} --protocol sprites` makes it")
        found.append(results.read(folder / CARD))
        for name, part in traces(folder).items():
            pages = sorted((part / "grids").glob("*.png"))
            grids += [(f"{name}: {page.stem}", page) for page in pages[-1:]]
            log = part / "metrics.jsonl"
            if log.exists():
                curves[name] = [json.loads(line) for line in log.read_text().splitlines()]
    return write_report(out, results=found, grids=grids, curves=curves)
