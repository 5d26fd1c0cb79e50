"""From a teacher to a student in one call: what `fewstep train` does with a config, for arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.api import Place, Run, train
from fewstep.config import parse
from fewstep.objectives import objectives
from fewstep.plain import check_objective, stepped

Part = Place | Mapping[str, Any]  # what a part of a config is chiefly about, or the whole part


def distill(
    *,
    teacher: Part,
    objective: str | Mapping[str, Any],
    data: Part,
    steps: int | None = None,
    out: Place = "runs/distilled",
    resume: bool = False,
    **settings: Any,
) -> Run:
    """Distils a teacher in one call. `data` is a source of prompts, or of images where the objective needs them; `teacher`,
    `objective` and `data` may be those parts of a config, `settings` are further ones (student=..., critic=..., train=...).
    steps None: the objective's own. Raises ValueError for whatever is wrong with them, and as `train` does."""
    chosen = _part(objective, "name")
    check_objective(chosen, "objective")
    if not isinstance(data, str | Path | Mapping):
        wanted = "a file of prompts, a folder of images, or settings as in data={'prompts': 'words.txt'}"
        raise ValueError(f"data must be {wanted}, not of type {type(data).__name__}")
    source = "images" if objectives()[chosen["name"]]().needs.images else "prompts"
    chosen = chosen if steps is None else stepped(chosen, steps)
    tree = {"teacher": _part(teacher, "path"), "objective": chosen, "data": _part(data, source), **settings}
    return train(parse(tree), Path(out), resume=resume)


def _part(given: Any, key: str) -> Any:
    """A part of a config as plain data; what is no such part is left for `parse` to refuse."""
    if isinstance(given, str | Path):
        return {key: str(given)}
    return {k: str(v) if isinstance(v, Path) else v for k, v in given.items()} if isinstance(given, Mapping) else given
