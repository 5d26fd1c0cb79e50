"""`fewstep eval` and `fewstep report`: a run, a pipeline folder or a folder of images becomes rows of numbers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.adapters import Teacher, load_teacher
from fewstep.api import Run
from fewstep.data import default_cache
from fewstep.denoiser import Denoiser, Guided
from fewstep.devices import default_device
from fewstep.evaluation import images as folders
from fewstep.evaluation import latency, results
from fewstep.evaluation.protocol import (
    Protocol,
    check_captions,
    check_size,
    describe,
    floor,
    judge,
    judge_less,
    load_prompts,
    load_protocol,
    prompts_sha,
)
from fewstep.evaluation.report import check_page, write_report
from fewstep.exported import Exported, is_export
from fewstep.painting import generate
from fewstep.stages import find, is_run, traces
from fewstep.zoo import HERE, SOURCES, judged

TEACHER_STEPS = (50, 1, 2, 4)
CARD = "results.json"  # a zoo teacher's own measured rows, beside its weights


@dataclass(frozen=True)
class Row:
    """One line to be measured: who, in how many steps, and how pictures are drawn for prompts, under a progress bar of a name."""

    model: str
    steps: int
    draw: Callable[[list[str], str], np.ndarray]


def evaluate(
    target: Path | str,
    protocol_name: str,
    *,
    out: Path | None,
    steps: list[int],
    fresh: bool,
    teacher: bool,
    given: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Path]:
    """Measures a target and writes results.json: to `out`, into a run or export, or else into the working folder under the
    target's name. Returns both. What an interrupted one measured lies beside it. Rows of a run or an export that were measured
    before, by the same protocol at the same round, stay where they are not measured again.

    given: what goes over the protocol's keys, but for None. A teacher of the zoo brings its rows on its card, taken where
    protocol and extractor are the same and `fresh` is not asked; what depends on the machine is measured here. Raises ValueError,
    before anything is drawn, for what cannot be judged, and for a file that is not to be written over."""
    protocol, target = load_protocol(protocol_name, given), Path(target)
    name = {"name": protocol.name, "hash": protocol.hash}
    home = (target, "results") if is_run(target) or is_export(target) else (Path(), f"{_name(target)}.results")
    where = out or results.place_in(*home, name)
    results.check_place(where, name, None if where.absolute().is_relative_to(target.absolute()) else str(target))
    drawn = _draws(target)
    measured, said, reached = _drawn(target, protocol, steps, teacher, fresh) if drawn else _pictures(target, protocol, steps)
    found = results.new([], said)
    found["environment"] |= {"target": str(target), **reached}
    part = where.with_name(f"{where.stem}.{protocol.hash[:8]}{results.PARTIAL}")
    try:
        for row in measured:
            found["rows"].append(row)
            results.write(part, found)
    except BaseException:
        if found["rows"]:
            warnings.warn(f"stopped; the rows measured so far ({len(found['rows'])}) are in {part}", stacklevel=2)
        raise
    found = results.with_earlier(found, where)
    results.write(where, found)
    part.unlink()
    return found, where


def _name(target: Path) -> str:
    return str(target).removeprefix("zoo:") if str(target).startswith("zoo:") else target.resolve().name


def check_files(protocol_name: str, numbers: Sequence[Path], page: Path) -> None:
    """Raises ValueError where results of a protocol, or a report, would go over what is no such file."""
    protocol = load_protocol(protocol_name)
    for file in numbers:
        results.check_place(file, {"name": protocol.name, "hash": protocol.hash})
    check_page(page)


def _draws(target: Path) -> bool:
    """Whether a target draws pictures, or is some. Raises ValueError for what is neither."""
    if is_run(target) or is_export(target) or str(target).startswith("zoo:") or (target / "model_index.json").exists():
        return True
    if not target.is_dir():
        raise ValueError(f"{target} is neither a run, an export, a Diffusers folder nor a folder of images; name one of these")
    return False


def _drawn(
    target: Path, protocol: Protocol, steps: list[int], teacher: bool, fresh: bool
) -> tuple[Iterator[dict[str, Any]], dict[str, Any], dict[str, int]]:
    """What a model scores, row by row as it is asked for, what that is measured by, and how far the student is trained."""
    prompts, described = load_prompts(protocol), partial(describe, protocol, cache=default_cache())
    rows, known, reached = _rows(target, protocol, steps, teacher, None if fresh else described)
    if protocol.accuracy:
        check_size(min(rows, key=lambda row: row.steps).draw(prompts[:1], ""), protocol)
    said = described() | _floor(protocol)
    scored = (_measure(r, prompts, protocol, known.get(r.steps, {}) if r.model == "teacher" else {}) for r in rows)
    return scored, said, reached


def _pictures(
    target: Path, protocol: Protocol, steps: list[int]
) -> tuple[Iterator[dict[str, Any]], dict[str, Any], dict[str, int]]:
    """What images in a folder score, with the prompts that their manifest says, and what that is measured by; nobody knows how
    far who drew them was trained."""
    if len(steps) > 1:
        raise ValueError(f"the images in {target} were drawn in one number of steps; give --steps once, or not at all")
    n, pictures = protocol.n, folders.load_folder(target)
    if (held := len(pictures.images)) < n:
        raise ValueError(f"{target} has {held} images, protocol {protocol.name!r} judges {n}; draw more, {judge_less(held)}")
    if held > n:
        warnings.warn(f"protocol {protocol.name!r} judges {n} of the {held} images, the first by name", stacklevel=2)
    images, own = pictures.images[:n], None if pictures.prompts is None else pictures.prompts[:n]
    if own is not None:
        check_captions(own, protocol)
        check_size(images, protocol)
    elif protocol.clip or protocol.accuracy:
        left_out = "CLIP score and accuracy, which depend on prompts, are left out"
        warnings.warn(f"{target} has no {folders.MANIFEST}: {left_out}", stacklevel=2)
    said = describe(protocol, cache=default_cache()) | _floor(protocol)
    sha = own and prompts_sha(own)
    if sha != said["prompts_sha256"]:
        said |= {"prompts": own and str(target / folders.MANIFEST), "prompts_sha256": sha}
        if own is not None and protocol.prompts is not None:
            warnings.warn(f"judged by the prompts of {said['prompts']}, not by those of protocol {protocol.name!r}", stacklevel=2)
    row = {"model": "images", "name": str(target)} | ({"steps": steps[0]} if steps else {})
    return iter([row | judge(images, own, protocol, cache=default_cache())]), said, {}


def _rows(
    target: Path, protocol: Protocol, steps: list[int], teacher: bool, described: Callable[[], dict[str, Any]] | None
) -> tuple[list[Row], dict[int, dict[str, Any]], dict[str, int]]:
    """The lines of what draws; by its steps, what the teacher's card says of them already, where it may be believed; and how far
    the student is trained."""
    if is_run(target):
        run = Run(target)
        reached = run.last.reached(run.place)
        lines = _students(run, steps or run.study.steps(), protocol)
        if not teacher:
            return lines, {}, reached
        master, guided = run.study.teacher, run.study.guided(run.study.roles["teacher"])
        known = _card(master, run.study.guidance, described)
        return [*(_guided(master, guided, n, protocol) for n in TEACHER_STEPS), *lines], known, reached
    if is_export(target):
        exported = Exported(target)
        return _students(exported, steps or exported.counts, protocol), {}, results.reached(exported.facts["record"])
    master = load_teacher(str(target), default_device())
    denoiser = master.guided(master.net)
    return [_guided(master, denoiser, n, protocol) for n in (steps or TEACHER_STEPS)], {}, {}


def _students(student: Run | Exported, steps: Sequence[int], protocol: Protocol) -> list[Row]:
    def row(n: int) -> Row:
        return Row("student", n, lambda prompts, bar: student.sample(prompts, n, protocol.seed, bar=bar))

    return [row(n) for n in steps]


def _guided(teacher: Teacher, denoiser: Denoiser | Guided, n: int, protocol: Protocol) -> Row:
    def draw(prompts: list[str], bar: str) -> np.ndarray:
        times = teacher.grid(n, "ddim")
        return generate(teacher, denoiser, teacher.encode(prompts), times, "ddim", seed=protocol.seed, bar=bar)

    return Row("teacher", n, draw)


def _card(teacher: Teacher, guidance: float, described: Callable[[], dict[str, Any]] | None) -> dict[int, dict[str, Any]]:
    """A zoo teacher's stored rows by their steps, if they were measured as we would."""
    file = HERE / teacher.path.removeprefix("zoo:") / CARD
    if described is None or not teacher.path.startswith("zoo:") or not file.exists() or guidance != teacher.guidance:
        return {}
    stored, said = results.read(file), described()
    same = all(stored["protocol"].get(k) == said[k] for k in ("hash", "extractor_id", "clip_id", "reference_sha256"))
    return {r["steps"]: r for r in stored["rows"]} if same else {}


def _measure(row: Row, prompts: list[str], protocol: Protocol, known: dict[str, Any]) -> dict[str, Any]:
    """A line's numbers; `known` ones are not measured again, but for the time that a picture takes here."""
    timing = latency.measure(lambda: row.draw(prompts[:1], ""), warmup=1, repeats=3)
    bar = f"{row.model}, {row.steps} step{'s' * (row.steps != 1)}"
    scores = known or judge(row.draw(prompts, bar), prompts, protocol, cache=default_cache())
    return {"model": row.model, "steps": row.steps, **scores, "latency_ms": timing["p50_ms"]}


def _floor(protocol: Protocol) -> dict[str, Any]:
    return {"fd_floor": floor(protocol, cache=default_cache())} if protocol.reference in SOURCES else {}


def table(found: dict[str, Any]) -> str:
    """The rows for a terminal."""
    columns = ("model", "steps", "fd", "kid", "coverage", "clip", "accuracy", "latency_ms")
    lines = ["  ".join(f"{c:>10}" for c in columns)]
    for row in found["rows"]:
        cells = [row.get(c, "-") for c in columns]
        lines.append("  ".join(f"{c:>10.4g}" if isinstance(c, float) else f"{c!s:>10}" for c in cells))
    return "\n".join(lines)


def report_runs(runs: list[Path], out: Path) -> Path:
    """One page for several run folders: what was measured of them, and how they were trained. Raises ValueError for a folder that
    holds neither."""
    found: list[dict[str, Any]] = []
    grids: list[tuple[str, Path]] = []
    curves: dict[str, list[dict[str, Any]]] = {}
    notes: list[str] = []
    for folder in runs:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}; name a run")
        measured, parts = {file: results.read(file) for file in results.places_in(folder)}, traces(folder)
        newest = {name: sorted((part / "grids").glob("*.png"))[-1:] for name, part in parts.items()}
        drawn = [(f"{name}: {page.stem}", page) for name, pages in newest.items() for page in pages]
        logs = {name: part / "metrics.jsonl" for name, part in parts.items()}
        logged = {name: _records(log) for name, log in logs.items() if log.exists()}
        if not (measured or drawn or logged):
            raise ValueError(f"{folder} holds no results, grids or curves; name a run that has begun, or what was scored")
        found, grids, curves = [*found, *measured.values()], [*grids, *drawn], {**curves, **logged}
        notes += _notes(folder, measured)
    return write_report(out, results=found, grids=grids, curves=curves, notes=notes)


def _notes(folder: Path, measured: Mapping[Path, dict[str, Any]]) -> list[str]:
    """What a reader of a folder's results should know: that there are none, or that they are of an earlier round."""
    config, last = find(folder) if is_run(folder) else (None, None)
    if config is not None and not measured:
        return [f"Nothing is measured of {folder} yet; `fewstep eval {folder} {judged(config.teacher.path)}` makes its table"]
    if last is None or last.place is None:
        return []
    reached = last.reached(last.place)
    found = ((file, one, results.stale(one, reached)) for file, one in measured.items())
    return [f"{file} {why}; {results.again(folder, one)}" for file, one, why in found if why]


def _records(log: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, but for a last one that a kill cut short."""
    found, lines = [], log.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{log}, line {number} is not JSON ({error}); remove that line") from error
    return found
