"""results.json: rows of numbers, the protocol that gave them, and where they were measured (design.md, section 6)."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fewstep import origin

# What must agree before two rows may stand in one table.
SAME = ("hash", "extractor_id", "clip_id", "reference_sha256", "prompts_sha256")
PARTIAL = ".partial.json"  # of results that are still being measured
MODELS = ("teacher", "student", "images")
MACHINE = ("cpu", "gpu", "cores", "threads")  # in the environment: what a latency depends on
REACHED = ("round", "stage")  # in the environment: how far the student was trained, and in which of several stages


def environment() -> dict[str, Any]:
    """python, torch, diffusers, cpu, gpu, cores, threads, git_commit (None outside a checkout; "+" if changed), date (UTC)."""
    try:
        diffusers = importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError:
        diffusers = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers,
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git_commit": origin.git_hash(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def new(rows: Sequence[dict], protocol: dict) -> dict[str, Any]:
    """Results of rows measured here and now; `protocol` is what `protocol.describe` gave. Raises ValueError as `write` does."""
    results = {"rows": list(rows), "protocol": dict(protocol), "environment": environment()}
    _check(results, "these results")
    return results


def write(path: str | Path, results: dict) -> None:
    """Writes results.json so that a kill at any instant leaves the old file or the new one, whole.

    Raises ValueError for a row without model or steps, a number that is not finite, or a protocol without hash.
    """
    path = Path(path)
    _check(results, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(results, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def place_in(folder: Path, name: str, protocol: Mapping[str, Any]) -> Path:
    """Where results of a protocol go: NAME.json, or NAME.PROTOCOL.json where that one holds those of another."""
    plain = folder / f"{name}.json"
    old = _held(plain)
    if old is None or old["protocol"]["hash"] == protocol["hash"]:
        return plain
    other = re.sub(r"[^\w.-]+", "-", str(protocol["name"]))
    return folder / f"{name}.{other}.json"


def places_in(folder: Path, name: str = "results") -> list[Path]:
    """The files of results that lie in a folder: NAME.json, and NAME.PROTOCOL.json of further protocols."""
    further = sorted(f for f in folder.glob(f"{name}.*.json") if not f.name.endswith(PARTIAL))
    return [f for f in (folder / f"{name}.json", *further) if f.is_file()]


def check_place(path: Path, protocol: Mapping[str, Any], target: str | None = None) -> None:
    """Raises ValueError where results of a protocol, and of a target if that is named, cannot be written, or would go over
    others, or over what holds no results."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file with --out, as in {path / 'results.json'}")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir():
        raise ValueError(f"{path} cannot be written, for {above} is a file; name another place with --out")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{path} cannot be written, for {above} is not yours to write in; name another place with --out")
    if not path.exists():
        return
    old = _held(path)
    if old is None:
        raise ValueError(f"{path} is there and is no results file of fewstep; name another place with --out")
    if old["protocol"]["hash"] != protocol["hash"]:
        name, mark = old["protocol"].get("name"), old["protocol"]["hash"]
        raise ValueError(f"{path} holds results of another protocol, {name!r} ({mark}); name another place with --out")
    of = old["environment"].get("target")
    if target and of and Path(of).absolute() != Path(target).absolute():
        raise ValueError(f"{path} holds results of another target, {of}; name another place with --out")


def _held(path: Path) -> dict[str, Any] | None:
    """The results that a file holds, or None."""
    try:
        return read(path)
    except ValueError:
        return None


def read(path: str | Path) -> dict[str, Any]:
    """What `write` wrote. Raises ValueError for a file that is not of that form."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no results file: {error}") from error
    _check(results, str(path))
    return results


def reached(told: Mapping[str, Any]) -> dict[str, int]:
    """How far the student was trained, as an environment or an export's record tells it; empty where it does not."""
    return {k: told[k] for k in REACHED if k in told}


def stale(results: Mapping[str, Any], now: Mapping[str, int]) -> str:
    """What keeps results from being those of a student that is trained so far, or ""; older ones do not say, and nobody knows."""
    then = reached(results["environment"])
    if then == now:
        return ""
    if not then:
        return "does not say at which round it was measured"
    return f"was measured at {_told(then)}, not at {_told(now)}"


def again(folder: Path, results: Mapping[str, Any]) -> str:
    """What measures a run as some results did."""
    return f"`fewstep eval {folder} --protocol {results['protocol'].get('name')}` measures it anew"


def with_earlier(new: dict, path: Path) -> dict[str, Any]:
    """New results, and the rows of a file that they go over for what was not measured now: where both say the same round, and all
    that the protocol stands for is the same. A latency is kept on the machine that it was measured on alone."""
    old = _held(path)
    ours = reached(new["environment"])
    if old is None or not ours or stale(old, ours) or any(old["protocol"].get(k) != new["protocol"].get(k) for k in SAME):
        return new
    here = all(old["environment"].get(k) == new["environment"].get(k) for k in MACHINE)
    before = [{k: v for k, v in row.items() if here or k != "latency_ms"} for row in old["rows"]]
    rows = {(row["model"], row["steps"]): row for row in (*before, *new["rows"])}
    return {**new, "rows": sorted(rows.values(), key=lambda row: MODELS.index(row["model"]))}


def _told(round_: Mapping[str, int]) -> str:
    return f"round {round_['round']}" + (f" of stage {round_['stage']}" if "stage" in round_ else "")


def measured(folder: Path, now: Mapping[str, int]) -> dict[str, Any] | None:
    """The results in a run's folder that are of its student as it is trained now, or None; others are left out with a warning."""
    found = [(file, read(file)) for file in places_in(folder)]
    for file, one in found:
        if why := stale(one, now):
            warnings.warn(f"{file} {why}, and is left out of the card; {again(folder, one)}", stacklevel=3)
    return next((one for _, one in found if not stale(one, now)), None)


def merge(first: dict, *others: dict) -> dict[str, Any]:
    """The rows of all, once each, under the first's protocol and environment.

    Raises ValueError if another protocol, extractor, CLIP model, reference or set of prompts made some of them.
    """
    rows = list(first["rows"])
    for other in others:
        for key in SAME:
            a, b = first["protocol"].get(key), other["protocol"].get(key)
            if a != b:
                raise ValueError(
                    f"rows measured under {key} {a} and under {b} do not compare; judge both with one protocol"
                    f" ({first['protocol'].get('name')!r}, {other['protocol'].get('name')!r})"
                )
        rows += [row for row in other["rows"] if row not in rows]
    return {"rows": rows, "protocol": first["protocol"], "environment": first["environment"]}


def _check(results: Any, where: str) -> None:
    if not isinstance(results, dict) or set(results) != {"rows", "protocol", "environment"}:
        raise ValueError(f"{where}: results hold rows, protocol and environment, and nothing else")
    if not isinstance(results["protocol"], dict) or not results["protocol"].get("hash"):
        raise ValueError(f"{where}: the protocol has no hash; take the entry from fewstep.evaluation.protocol.describe")
    if not isinstance(results["rows"], list) or not all(isinstance(row, dict) for row in results["rows"]):
        raise ValueError(f"{where}: rows are a list of mappings")
    if not isinstance(results["environment"], dict):
        raise ValueError(f"{where}: environment is a mapping")
    for number, row in enumerate(results["rows"]):
        unknown = row.get("model") == "images" and "steps" not in row  # a folder of images need not say how it was drawn
        if row.get("model") not in MODELS or not (unknown or isinstance(row.get("steps"), int)):
            raise ValueError(
                f"{where}, row {number}: model must be teacher, student or images, and steps a whole number, not {row}"
            )
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{where}, row {number}: {key} is {value}; leave out what could not be measured")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
