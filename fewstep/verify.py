"""Verify: an export is judged in a fresh process that cannot import fewstep, by stock Diffusers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PROOF = Path(__file__).with_name("proof.py")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, whether it holds, and the numbers or the reason."""

    name: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """All findings on an export; ok if every one holds."""

    ok: bool
    checks: tuple[Check, ...]

    def __str__(self) -> str:
        return "\n".join(f"{'ok    ' if c.ok else 'FAILED'} {c.name}{': ' if c.detail else ''}{c.detail}" for c in self.checks)


def verify(folder: Path | str, teacher_path: str | None = None) -> Report:
    """Loads an export as its card says and compares times, pixels, seeds and LoRA strength with what it promises.

    teacher_path: where a LoRA's teacher lies now, if not where it was. A broken export is a report that is not ok.
    Raises ValueError if `folder` is no export, or its teacher cannot be found."""
    folder = Path(folder).resolve()
    if not (folder / "fewstep.json").is_file():
        raise ValueError(f"{folder} is not a fewstep export (it has no fewstep.json); `fewstep export RUN --to DIR` makes one")
    teacher = base_of(folder, teacher_path)
    with tempfile.TemporaryDirectory(prefix="fewstep-verify-") as scratch:
        ran = subprocess.run(
            [sys.executable, "-I", str(PROOF), str(folder), teacher, scratch],
            capture_output=True,
            text=True,
            env=os.environ | OFFLINE,
            cwd=scratch,
            check=False,
        )
    try:
        checks = tuple(Check(**found) for found in json.loads(ran.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        checks = (Check("fresh process", False, f"it ended with code {ran.returncode} before the first check: {last}"),)
    return Report(all(c.ok for c in checks), checks)


def base_of(folder: Path, given: str | None = None) -> str:
    """What stock Diffusers loads a LoRA on, a local folder or a hub id; "" for a full export. given: where that lies now, if not
    where it was. Raises ValueError if it is not there."""
    try:
        facts = json.loads((folder / "fewstep.json").read_text("utf-8"))
        recorded = facts["teacher"]["path"] if facts["form"] == "lora" else None
    except (ValueError, KeyError, TypeError):
        return ""  # damaged: the proof says so
    if recorded is None:
        return ""
    from fewstep.adapters import teacher_folder

    path = given or recorded
    try:
        place = teacher_folder(path)
    except ValueError as error:
        now = "put it back there, or give `fewstep verify` its place with --teacher (teacher_path in Python)"
        raise ValueError(f"{error} (this LoRA's teacher was {recorded}; {now})") from error
    return str(place.resolve()) if place else path
