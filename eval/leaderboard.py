"""Renders eval/results/*.json to one table, and the best of it to README's: `python eval/leaderboard.py [--out PAGE.md]`.

A row is a config at a number of steps, its mean over seeds (deviation where there are several); teachers stand above the students
they were measured with. What a result does not say is a dash; nothing is guessed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import claims
import yaml

from fewstep.config import parse
from fewstep.evaluation import results

HERE = Path(__file__).parent
COLUMNS = (
    "method",
    "steps",
    "teacher",
    "seeds",
    "FD",
    "CLIP",
    "accuracy",
    "recall",
    "coverage",
    "train s",
    "CPU s",
    "peak GB",
    "passes a round",
)
MEASURES = {"fd": ".1f", "clip": ".1f", "accuracy": ".3f", "recall": ".3f", "coverage": ".3f"}
COSTS = {"train_seconds": ".0f", "train_cpu_seconds": ".0f", "peak_gb": ".2f"}
START, END = "<!-- best: python eval/leaderboard.py -->", "<!-- end of best -->"
HEAD = """# Leaderboard

Made by `python eval/leaderboard.py` from `eval/results/`; do not edit. Lower FD is better; a dash was not recorded. Numbers are
comparable inside one table only: one protocol, one set of teacher weights behind its features. A star marks the steps
that a student was trained for.
"""


def entries(folder: Path) -> list[dict[str, Any]]:
    """What each results file says: protocol and rows of the table. Files without rows (a bench, a summary) are passed over."""
    found = []
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith(".summary.json") or "rows" not in json.loads(file.read_text(encoding="utf-8")):
            continue
        result = results.read(file)
        beside = file.with_suffix(".summary.json")
        cost = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        found.append({"protocol": result["protocol"], "rows": _rows(file.stem, result["rows"], _teacher(cost), cost)})
    return found


def _teacher(cost: Mapping[str, Any]) -> str | None:
    """Whose student it is: what the summary says, or the config that an older one names."""
    config = HERE.parent / cost.get("config", "")
    if "teacher" not in cost and config.is_file():
        return yaml.safe_load(config.read_text(encoding="utf-8"))["teacher"]["path"]
    return cost.get("teacher")


def _rows(name: str, rows: list[dict[str, Any]], teacher: str | None, cost: Mapping[str, Any]) -> list[tuple[int, list[str]]]:
    """(0 for a teacher, 1 for a student; cells) of each model and number of steps of one file."""
    found, home = [], _home(cost)
    for model, steps in dict.fromkeys((r["model"], r["steps"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["steps"]) == (model, steps)]
        student = model == "student"
        spent = [_mean(cost.get(key), form) for key, form in COSTS.items()] + [_passes(cost)]
        cells = [
            name if student else model,
            f"{steps}*" if student and steps == home else str(steps),
            teacher or "-",
            str(len({r["seed"] for r in mine if "seed" in r}) or "-"),
            *(_mean([r[key] for r in mine if r.get(key) is not None], form) for key, form in MEASURES.items()),
            *(spent if student else ["-"] * (len(COSTS) + 1)),
        ]
        found.append((int(student), cells))
    return found


def _home(cost: Mapping[str, Any]) -> int | None:
    """The number of steps that a student was trained for, in the last of its stages."""
    if "settings" not in cost:
        return None
    return parse(cost["settings"]).objective.steps


def _mean(values: Iterable[float | None] | None, form: str) -> str:
    """The mean and, of several, the deviation; a dash where there is none."""
    known = [v for v in values or () if v is not None]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else ""
    return f"{statistics.mean(known):{form}}{spread}"


def _passes(cost: Mapping[str, Any]) -> str:
    """Passes of a batch that a round makes, by network, and in brackets how many of them keep a graph."""
    made = cost.get("passes") or {}
    names = [n for n in made if not n.endswith("_backward")]
    return ", ".join(f"{n} {made[n]:.3g} ({made.get(f'{n}_backward', 0):.3g})" for n in names) or "-"


def render(folder: Path) -> str:
    """The page: one table a protocol and extractor, best FD first in each number of steps, and what they say of the aims."""
    tables: dict[tuple[str, str], list[tuple[int, list[str]]]] = {}
    for one in entries(folder):
        protocol = one["protocol"]
        title = f"{protocol.get('name', 'unnamed')} ({protocol['hash']})", protocol.get("extractor_id", "-")
        known = tables.setdefault(title, [])
        known += [row for row in one["rows"] if row not in known]
    page = [HEAD]
    for (name, extractor), rows in tables.items():
        page += [f"## {name}\n", f"Features: `{extractor}`\n"]
        page += ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
        rows.sort(key=lambda row: (row[1][2], row[0], int(row[1][1].rstrip("*")), row[1][4] == "-", _number(row[1][4])))
        page += ["| " + " | ".join(cells) + " |" for _, cells in rows] + [""]
    return "\n".join(page + claims.page(folder))


def best(known: list[claims.Student], most: int = 6) -> str:
    """README's table: of each teacher and number of steps the students nearest to the drawings, at what they were trained for."""
    rows, places = [], {(s.teacher.split()[0], s.steps) for s in known}
    for teacher, steps in sorted(places, key=lambda place: (place[0] != "zoo:sprites-sd", place)):
        mine = [s for s in known if (s.teacher.split()[0], s.steps) == (teacher, steps)]
        for s in sorted(mine, key=lambda s: s.own[steps]["fd"])[:most]:
            pairs = (f"{m[steps][key]:{form}}" for key, form in (("fd", ".1f"), ("accuracy", ".3f")) for m in (s.own, s.theirs))
            fd, there, right, theirs = pairs
            spread = f" ± {statistics.stdev(s.each['fd']):.1f}" if len(s.each["fd"]) > 1 else ""
            spent = "-" if s.seconds is None else f"{s.seconds:.0f}"
            rows.append([f"`{s.name}`", str(steps), fd + spread, there, right, theirs, spent, str(len(s.each["fd"]))])
    head = ["config", "steps", "FD", "the teacher's there", "accuracy", "the teacher's there", "CPU seconds", "seeds"]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def between(text: str, table: str) -> str:
    """A README's text with the table between its marks."""
    before, rest = text.split(START)
    return f"{before}{START}\n{table}\n{END}{rest.split(END)[1]}"


def _number(cell: str) -> float:
    return 0.0 if cell == "-" else float(cell.split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "LEADERBOARD.md")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    args = parser.parse_args()
    args.out.write_text("\n".join([render(args.results), *claims.notes(HERE.parent / "configs")]), encoding="utf-8")
    text = between(args.readme.read_text(encoding="utf-8"), best(claims.students(args.results)))
    args.readme.write_text(text, encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
