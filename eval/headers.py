"""Writes what was measured into the heads of the configs: `python eval/headers.py [--check]`.

The block of comments that begins with "# Measured:" says what eval/results/NAME.json holds; the rest of a head is its author's.
--check writes nothing, and fails where a head is not up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BLOCK = re.compile(r"# Measured:.*\n(?:#  .*\n)*")
NOTE, MARK = re.compile(BLOCK.pattern.replace("Measured", "Note")), re.compile(r"^#(?: Note:)?", re.MULTILINE)


def said(name: str, folder: Path) -> str:
    """The block of a config that was measured."""
    result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    cost = json.loads((folder / f"{name}.summary.json").read_text(encoding="utf-8"))
    rows = result["rows"]
    seeds = sorted({r["seed"] for r in rows if r["model"] == "student"})
    spent = [s for s in cost.get("train_cpu_seconds") or cost.get("train_seconds") or [] if s is not None]
    what = f"one core of {result['environment']['cpu']}" + (f", {statistics.mean(spent):.0f} s of it" if spent else "")
    seeded = f"--seeds {' '.join(map(str, seeds))}"
    lines = [f"# Measured: python eval/distill.py configs/{name}.yaml {seeded}   ({what}; {result['protocol']['n']:,} samples)"]
    for steps in sorted({r["steps"] for r in rows if r["model"] == "student"}):
        beside = _judged(rows, "teacher", steps)
        lines.append(f"#           {counted(steps)}: {_judged(rows, 'student', steps)}{beside and f' (teacher: {beside})'}")
    if best := _judged(rows, "teacher", 50):
        lines.append(f"#           The teacher in 50 steps: {best}")
    return "\n".join(lines) + "\n"


def counted(steps: int) -> str:
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def _judged(rows: list[dict[str, Any]], model: str, steps: int) -> str:
    """FD with its deviation over seeds, accuracy and coverage of a model in some steps; empty if it was not judged there."""
    mine = [r for r in rows if (r["model"], r["steps"]) == (model, steps)]
    if not mine:
        return ""
    fd = [r["fd"] for r in mine]
    spread = f" +- {statistics.stdev(fd):.1f}" if len(fd) > 1 else ""
    rest = (f"{key} {statistics.mean(r[key] for r in mine):.3f}" for key in ("accuracy", "coverage") if key in mine[0])
    return ", ".join([f"FD {statistics.mean(fd):.1f}{spread}", *rest])


def note(text: str) -> str:
    """What a config's head says under "# Note:", in one line; empty without one."""
    found = NOTE.search(text)
    return " ".join(MARK.sub("", found[0]).split()) if found else ""


def head(text: str, block: str) -> str:
    """A config's text with the block in the place of the old one, or else at the end of its comments."""
    bare = BLOCK.sub("", text)
    place = BLOCK.search(text)
    at = place.start() if place else re.search(r"^(?!#)", bare, re.MULTILINE).start()  # type: ignore[union-attr]
    return bare[:at] + block + bare[at:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--configs", type=Path, default=HERE.parent / "configs")
    args = parser.parse_args()
    late = []
    for file in sorted(args.configs.glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        known = (args.results / f"{file.stem}.json").exists()
        true = head(text, said(file.stem, args.results) if known else "# Measured: not yet.\n")
        if text != true:
            late.append(file.name)
            if not args.check:
                file.write_text(true, encoding="utf-8")
    if args.check and late:
        sys.exit(f"run python eval/headers.py: {', '.join(late)} say other than eval/results")
    print("\n".join(late))


if __name__ == "__main__":
    main()
