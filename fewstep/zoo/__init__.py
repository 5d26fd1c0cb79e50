"""The embedded zoo: teachers and a yardstick small enough to travel with the package."""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent / "models"
TEACHERS, JUDGE = ("sprites-sd", "sprites-flow"), "sprites-clip"
NAMES = (*TEACHERS, JUDGE)


def folder(name: str) -> Path:
    """Where zoo:NAME lies. Raises ValueError for a name that is not in the zoo."""
    if name not in NAMES:
        teachers = " and ".join(f"zoo:{n}" for n in TEACHERS)
        raise ValueError(f"the zoo has no {name!r}; its teachers are {teachers}, what pictures are judged by is zoo:{JUDGE}")
    if not (HERE / name).exists():
        raise ValueError(f"zoo:{name} is not in this installation; `python -m fewstep.zoo.build` makes it")
    return HERE / name


def guidance(name: str) -> float | None:
    """The guidance scale that a teacher of the zoo is meant for, as its card says; None where there is no card yet."""
    card = HERE / name / "card.json"
    return float(json.loads(card.read_text())["guidance"]) if card.exists() else None
