"""What the leaderboard's tables say of what was aimed at: sentences computed from the results, whether it held or not."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headers import counted, note

from fewstep.config import Config, parse
from fewstep.evaluation import results
from fewstep.objectives.adversarial import Adversarial
from fewstep.objectives.base import Objective
from fewstep.objectives.dmd import DMD
from fewstep.objectives.f_distill import FDistill
from fewstep.objectives.phased_dmd import PhasedDMD

MEASURES = ("fd", "accuracy", "recall", "coverage")


@dataclass(frozen=True)
class Student:
    """One results file: a student, what it was trained with and for how many seconds of one processor at most, each measure at
    its steps for every seed, and its mean measures by number of steps beside its teacher's."""

    name: str
    teacher: str
    steps: int
    config: Config
    seconds: float | None
    each: Mapping[str, tuple[float, ...]]
    own: Mapping[int, Mapping[str, float]]
    theirs: Mapping[int, Mapping[str, float]]

    @property
    def objective(self) -> Objective:
        return self.config.objective

    def times(self, reference: int) -> float:
        """Its FD at its steps over its teacher's at `reference` steps."""
        return self.own[self.steps]["fd"] / self.theirs[reference]["fd"]


def students(folder: Path) -> list[Student]:
    """Those whose results say how they were trained, judged at the few steps they were trained for."""
    found = []
    for file in sorted(folder.glob("*.summary.json")):
        cost = json.loads(file.read_text(encoding="utf-8"))
        if "settings" not in cost:
            continue
        config, name = parse(cost["settings"]), file.name.removesuffix(".summary.json")
        rows = results.read(folder / f"{name}.json")["rows"]
        own, theirs = (_means(r for r in rows if r["model"] == model) for model in ("student", "teacher"))
        steps, spent = config.objective.steps, [x for x in cost.get("train_cpu_seconds") or () if x is not None]
        if steps in own and steps < 50 and {50, steps} <= theirs.keys():
            mine = [r for r in rows if (r["model"], r["steps"]) == ("student", steps)]
            each = {key: tuple(r[key] for r in mine) for key in own[steps]}
            found.append(Student(name, cost["teacher"], steps, config, max(spent, default=None), each, own, theirs))
    return found


def _means(rows: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    known: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        known.setdefault(row["steps"], []).append(row)
    return {
        steps: {key: statistics.mean(r[key] for r in some) for key in MEASURES if all(key in r for r in some)}
        for steps, some in known.items()
    }


def halved(known: list[Student]) -> Iterable[str]:
    """Half of the teacher's distance at the student's own number of steps."""
    for steps in sorted({s.steps for s in known}):
        mine = [s for s in known if s.steps == steps]
        missed = sorted((s.times(steps), s.name) for s in mine if s.times(steps) > 0.5)
        tail = "; not " + ", ".join(f"{name} ({ratio:.2f})" for ratio, name in missed) if missed else ""
        held = f"{len(mine) - len(missed)} of {len(mine)}"
        yield f"at most half of the teacher's FD in {counted(steps)}: {held} trained for it{tail}"


def near(known: list[Student]) -> Iterable[str]:
    """Within 1.3 times the teacher's distance at 50 steps."""
    for steps in sorted({s.steps for s in known}):
        best = min((s for s in known if s.steps == steps), key=lambda s: s.times(50))
        verdict = "held" if best.times(50) <= 1.3 else "missed"
        said = f"{verdict}, {best.name} has {best.times(50):.2f}"
        yield f"at most 1.3 times the teacher's FD in 50 steps, in {counted(steps)}: {said}"


def unified(known: list[Student]) -> Iterable[str]:
    """One LoRA, trained in stages, at every number of steps it is judged at."""
    for s in known:
        if len(s.config.stages) > 2 and s.config.student.weights == "lora":
            both = sorted(s.own.keys() & s.theirs.keys())
            parts = [f"{s.own[n]['fd'] / s.theirs[n]['fd']:.2f} in {counted(n)}" for n in both]
            yield f"one LoRA for all steps, {s.name}, times the teacher's FD there: {', '.join(parts)}"


def seeded(known: list[Student]) -> Iterable[str]:
    """With how many seeds the nearest were measured."""
    nearest = sorted((s for s in known if s.steps == 1), key=lambda s: s.own[1]["fd"])[:5]
    if nearest:
        yield "seeds of the nearest in 1 step: " + ", ".join(f"{len(s.each['fd'])} ({s.name})" for s in nearest)


def cheap(known: list[Student]) -> Iterable[str]:
    """Twenty minutes of one processor."""
    spent = sorted((s.seconds / 60, s.name) for s in known if s.seconds is not None)
    late = [f"{name} ({minutes:.1f})" for minutes, name in spent if minutes > 20]
    if spent:
        tail = "; not " + ", ".join(late) if late else f"; the longest {spent[-1][0]:.1f}, {spent[-1][1]}"
        yield f"at most 20 minutes of one processor: {len(spent) - len(late)} of {len(spent)}{tail}"


def real(known: list[Student]) -> Iterable[str]:
    """Whether real data take a student past its teacher."""
    for s in known:
        if isinstance(s.objective, Adversarial | FDistill):
            verdict = "below" if s.times(50) < 1 else "not below"
            yield f"real data through heads, {s.name}: {verdict} the teacher's 50 steps ({s.times(50):.2f} times its FD)"


def forward(known: list[Student]) -> Iterable[str]:
    """Whether the forward KL keeps more modes than the reverse one."""
    kl, rkl = ([s for s in known if isinstance(s.objective, FDistill) and s.objective.divergence == f] for f in ("kl", "rkl"))
    pairs = _alike(kl, rkl)
    yield from (f"{a.name} against {b.name}: {_kept(a, b)}" for a, b in pairs)
    if not pairs and any(isinstance(s.objective, FDistill) for s in known):
        yield "forward against reverse KL: not measured on this teacher"


def phased(known: list[Student]) -> Iterable[str]:
    """Whether experts by phase keep more modes than one network, at no worse a distance."""
    several, single = ([s for s in known if isinstance(s.objective, kind)] for kind in (PhasedDMD, DMD))
    for a, b in _alike(several, single):
        fd = f"FD {a.own[a.steps]['fd']:.1f} against {b.own[b.steps]['fd']:.1f}"
        yield f"{a.name} against {b.name}: {fd}, {_kept(a, b)}"


def _alike(some: list[Student], others: list[Student]) -> list[tuple[Student, Student]]:
    """Those of one teacher and number of steps."""
    return [(a, b) for a in some for b in others if (a.teacher, a.steps) == (b.teacher, b.steps)]


def _kept(a: Student, b: Student) -> str:
    parts = []
    for key in ("recall", "coverage"):
        x, y = (statistics.mean(s.each[key]) for s in (a, b))
        spread = max(statistics.stdev(v) if len(v) > 1 else 0.0 for v in (a.each[key], b.each[key]))
        verdict = "more" if x > y + spread else "less" if x < y - spread else "no more than seeds differ"
        parts.append(f"{key} {x:.3f} against {y:.3f} ({verdict})")
    return f"{', '.join(parts)}; seeds: {len(a.each['fd'])} and {len(b.each['fd'])}"


CLAIMS: tuple[Callable[[list[Student]], Iterable[str]], ...] = (halved, near, unified, real, forward, phased, seeded, cheap)


def page(folder: Path) -> list[str]:
    """The lines of the section, teacher by teacher."""
    known = students(folder)
    lines = []
    for path in sorted({s.teacher.split()[0] for s in known}):
        mine = [s for s in known if s.teacher.split()[0] == path]
        lines += [f"### {path}\n", *(f"- {line}" for claim in CLAIMS for line in claim(mine)), ""]
    return ["## What was aimed at\n", *lines] if lines else []


def notes(folder: Path) -> list[str]:
    """What the heads of configs say of how their settings were found."""
    found = {file.stem: note(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.yaml"))}
    lines = [f"- {name}: {said}" for name, said in found.items() if said]
    return ["## What was tried\n", *lines, ""] if lines else []
