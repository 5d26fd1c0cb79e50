"""The embedded zoo: teachers and a yardstick small enough to travel with the package."""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent / "models"
WORLDS = ("sprites", "clouds")
TEACHERS = ("sprites-sd", "sprites-flow", "clouds-sd", "clouds-flow")
JUDGES = tuple(f"{world}-clip" for world in WORLDS)
NAMES = (*TEACHERS, *JUDGES)
SOURCES = {f"zoo:{world}": world for world in WORLDS}  # where prompts and images may come from


def folder(name: str) -> Path:
    """Where zoo:NAME lies. Raises ValueError for a name that is not in the zoo."""
    if name not in NAMES:
        teachers, judges = (", ".join(f"zoo:{n}" for n in names) for names in (TEACHERS, JUDGES))
        raise ValueError(f"the zoo has no {name!r}; its teachers are {teachers}; pictures are judged by {judges}")
    if not (HERE / name).exists():
        raise ValueError(f"zoo:{name} is not in this installation; `python -m fewstep.zoo.build` makes it")
    return HERE / name


def world(source: str, kind: str) -> str:
    """The world that zoo:NAME names. Raises ValueError, which says that there is no such `kind` there, for another name."""
    if source not in SOURCES:
        raise ValueError(f"there are no {kind} at {source}; the embedded worlds are {' and '.join(SOURCES)}")
    return SOURCES[source]


def home(name: str) -> str:
    """The world of a model of the zoo, after which the protocol that judges it is named too."""
    return name.removeprefix("zoo:").partition("-")[0]


def judged(teacher: str) -> str:
    """The options of `fewstep eval` that judge pictures of a teacher: its world's protocol, or the user's own images."""
    return f"--protocol {home(teacher)}" if teacher.startswith("zoo:") else "--reference FOLDER --prompts FILE"


def guidance(name: str) -> float | None:
    """The guidance scale that a teacher of the zoo is meant for, as its card says; None where there is no card yet."""
    card = HERE / name / "card.json"
    return float(json.loads(card.read_text())["guidance"]) if card.exists() else None
