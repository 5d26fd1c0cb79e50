"""What there is to choose from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.objectives import Needs

KINDS = ("objectives", "teachers", "configs")
PLACES = (Path("configs"), Path(__file__).parents[1] / "configs")  # here, or in the checkout that runs; a wheel has none


def listing(what: str) -> list[dict[str, Any]]:
    """Entries with at least `name` and `about`. Raises ValueError for a kind there is none of."""
    if what == "objectives":
        return _objectives()
    if what == "teachers":
        return _teachers()
    if what == "configs":
        return next((found for place in PLACES if (found := _configs(place))), [])
    raise ValueError(f"there is no list of {what!r}; there are lists of {', '.join(KINDS)}")


def _objectives() -> list[dict[str, Any]]:
    from fewstep.objectives import objectives

    return [
        {
            "name": name,
            "about": " ".join((kind.__doc__ or "").split("\n\n")[0].split()),
            "needs": _needs(kind().needs),
        }
        for name, kind in objectives().items()
    ]


def _needs(needs: Needs) -> list[str]:
    return [*needs.roles, *(["images"] if needs.images else []), *(["pairs"] if needs.pairs else [])]


def _teachers() -> list[dict[str, Any]]:
    from fewstep.families import FAMILIES
    from fewstep.zoo import HERE, NAMES

    zoo = [{"name": f"zoo:{n}", "about": "embedded, no download"} for n in NAMES if (HERE / n / "model_index.json").exists()]
    return zoo + [
        {"name": name, "about": f"any folder or hub id of this class ({f.component})"} for name, f in sorted(FAMILIES.items())
    ]


def _configs(folder: Path) -> list[dict[str, Any]]:
    """YAML files in and below a folder with the first line of their header."""
    found = []
    for file in sorted(folder.rglob("*.yaml")):
        first = next(iter(file.read_text("utf-8").splitlines()), "")
        found.append({"name": str(file), "about": first.lstrip("# ").strip()})
    return found
