"""Configs as plain data: read from a file, objectives to and from it, overrides, stages merged; unknown keys refused with the
nearest known one, and numbers that are none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from fewstep.hints import hint, read_yaml
from fewstep.objectives import Objective, objectives
from fewstep.objectives.samplers import check_sampler

# What papers and their models are called, less marks, and what makes them here.
ALIASES = {
    "lcm": "consistency",
    "pcm": "consistency, with segments",
    "hypersd": "tcd, with segments",
    "tscd": "tcd, with segments",
    "dmd2": "dmd, or adversarial around it",
    "sdxllightning": "progressive, or adversarial_distance around it",
    "lightning": "progressive, or adversarial_distance around it",
    "rectifiedflow": "reflow",
    "instaflow": "reflow, and regression in a second stage",
    "swiftbrush": "vsd",
    "ladd": "adversarial, with heads: ladd",
}


def read(file: Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises ValueError where there are none."""
    if (file / "config.yaml").is_file():
        raise ValueError(f"{file} is a folder; name the config in it, {file / 'config.yaml'}")
    if not file.is_file():
        raise ValueError(f"there is no config at {file}; `fewstep list configs` names those that ship")
    try:
        tree = read_yaml(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds no settings; configs/ has complete examples")
    return tree


def made(tree: Mapping[str, Any]) -> Objective:
    """The objective that checked plain data name; one that wraps another holds it as a field."""
    values = {k: v for k, v in tree.items() if k != "name"}
    if "inner" in values:
        try:
            values["inner"] = made(values["inner"])
        except ValueError as error:
            raise ValueError(f"inner: {error}") from error
    try:
        found: Objective = TypeAdapter(objectives()[tree["name"]]).validate_python(values)
    except ValidationError as error:  # nested, its message would be a paragraph
        raise ValueError(first_fault(error)) from error
    check_sampler(tree["name"], found)
    return found


def told(objective: Objective) -> dict[str, Any]:
    """The plain data that `made` makes an objective of."""
    values = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}  # type: ignore[arg-type]
    return {"name": name_of(objective), **{k: told(v) if isinstance(v, Objective) else v for k, v in values.items()}}


def check_objective(tree: Any, where: str) -> None:
    """Raises ValueError for plain data that name no objective, or options it has not."""
    known = objectives()
    if not isinstance(tree, Mapping) or "name" not in tree:
        raise ValueError(f"{where} needs a name, as in {where}: {{name: dmd}}; `fewstep list objectives` names them")
    name = tree["name"]
    if not isinstance(name, str) or name not in known:
        alias = ALIASES.get("".join(c for c in str(name).lower() if c.isalnum()))
        said = f"is called {alias}, here" if alias else f"is not known{hint(str(name), known)}"
        raise ValueError(f"{where}.name: {name!r} {said}; `fewstep list objectives` names them")
    check_keys(tree, ["name", *(f.name for f in dataclasses.fields(known[tree["name"]]))], where)  # type: ignore[arg-type]
    if isinstance(tree.get("steps"), int) and tree["steps"] < 1:
        raise ValueError(f"{where}.steps must be at least 1, not {tree['steps']}")
    if "inner" in tree:
        check_objective(tree["inner"], f"{where}.inner")


def stepped(chosen: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """A known objective with its number of steps, which a wrapper leaves to what it wraps."""
    own = told(objectives()[chosen["name"]]())
    if "inner" not in own:
        return {"steps": steps, **chosen}
    inner = chosen.get("inner") or {k: v for k, v in own["inner"].items() if k != "steps"}
    return {**chosen, "inner": stepped(inner, steps)}


def name_of(objective: Objective) -> str:
    """The registered name of an objective."""
    return next(name for name, kind in objectives().items() if type(objective) is kind)


def override(tree: dict[str, Any], text: str) -> None:
    """Applies one `a.b=value` to a tree, in each of its stages too; `stages.2.a.b=value` in the second alone. YAML values."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set wants KEY=VALUE, as in --set train.rounds=100, not {text!r}")
    try:
        given = read_yaml(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text}: the value is not YAML; put it in quotes") from error
    path, stages = key.strip().split("."), tree.get("stages") or []
    if path[0] == "stages":
        if len(path) < 3 or not path[1].isdigit() or not 1 <= int(path[1]) <= len(stages):
            raise ValueError(f"--set {text}: there is no such stage; stages.1.train.rounds=100 is for the first of {len(stages)}")
        places, path = [stages[int(path[1]) - 1]], path[2:]
    else:  # a stage that says nothing of its own of this part has the common one
        places = [tree, *(stage for stage in stages if isinstance(stage, dict) and isinstance(stage.get(path[0]), dict))]
    for place in places:
        for name in path[:-1]:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ValueError(f"--set {text}: {name} holds a value, not further settings")
        place[path[-1]] = given


def staged(tree: Mapping[str, Any], known: Collection[str]) -> list[dict[str, Any]]:
    """The whole tree of each stage: what it says of its own over what is said once for all. known: the parts of a config.

    Settings are merged one by one, but an objective with a name, or data with a source, stands for itself. `teacher: previous` is
    short for {net: previous}. Raises ValueError for stages that are no settings, or parts that are not known."""
    if not isinstance(tree["stages"], list | tuple):
        raise ValueError("stages must be a list of settings, as in stages: [{objective: {segments: 4}}, {teacher: previous}]")
    common, found = {k: v for k, v in tree.items() if k != "stages"}, []
    for i, own in enumerate(tree["stages"], 1):
        check_keys(own, known, f"stages.{i}")
        own = {k: {"net": v} if k == "teacher" and isinstance(v, str) else v for k, v in own.items()}
        found.append(_over(common, own))
    return found


def _over(below: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over what lies below it."""
    out = dict(below)
    for key, value in own.items():
        under = out.get(key)
        parts = isinstance(value, Mapping) and isinstance(under, Mapping) and not value.keys() & {"name", "prompts", "images"}
        out[key] = _over(under, value) if parts else value  # type: ignore[arg-type]
    return out


def first_fault(error: ValidationError) -> str:
    """The first thing that pydantic objects to, as one sentence with its dotted place."""
    first = error.errors()[0]
    where = ".".join(str(x) for x in first["loc"])
    said = first["msg"].removeprefix("Value error, ")
    return f"{where}: {said}" if where else said


def check_keys(tree: Any, known: Any, where: str) -> None:
    """Raises ValueError for a key that is not known, with the nearest known one."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where or 'the config'} must hold settings, not {tree!r}")
    for key in tree:
        if key not in known:
            raise ValueError(
                f"{where + '.' if where else ''}{key}: unknown option{hint(str(key), known)}; known: {', '.join(known)}"
            )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The settings of plain data by their dotted names."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, value in tree.items() for k, v in flat(value, f"{prefix}{name}.").items()}


def check_finite(tree: dict[str, Any]) -> None:
    """Raises ValueError for a number that is nan or infinite, alone or in a list."""
    for where, value in flat(tree).items():
        for x in value if isinstance(value, list | tuple) else [value]:
            if isinstance(x, float) and not math.isfinite(x):
                raise ValueError(f"{where} must be a finite number, not {x}")


def check_truths(given: Mapping[str, Any], parsed: Mapping[str, Any]) -> None:
    """Raises ValueError for a true or false where a number is wanted, which would count as 1 or 0."""
    known = flat(dict(parsed))
    for where, value in flat(dict(given)).items():
        kept = known.get(where, value)
        pairs = zip(value, kept, strict=True) if isinstance(value, list | tuple) else [(value, kept)]
        if any(isinstance(x, bool) and not isinstance(y, bool) for x, y in pairs):
            raise ValueError(f"{where} wants numbers, not true or false")
