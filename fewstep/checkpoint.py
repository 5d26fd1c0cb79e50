"""Checkpoints: whole or absent, every role by name, safetensors and JSON only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep import origin

FORMAT = 1


def save(folder: Path, round_: int, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int) -> Path:
    """Writes `folder/step-XXXXXXX` and returns it; a kill at any instant leaves the previous one whole.

    files: name -> tensors, one safetensors file each. state: what else is needed, JSON. Older ones beyond `keep` are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for rest in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):
        shutil.rmtree(rest)  # what a killed save or a killed removal left
    scratch, target = folder / f".writing-{os.getpid()}", folder / f"step-{round_:07d}"
    scratch.mkdir()
    sizes = {}
    for name, tensors in files.items():
        file = scratch / f"{name}.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file)
        _flush(file)
        sizes[file.name] = file.stat().st_size
    made_by = {"versions": origin.versions(), "git": origin.git_hash()}
    record = {"format": FORMAT, "round": round_, "files": sizes, **made_by, **state}
    (scratch / "state.json").write_text(json.dumps(record, indent=2) + "\n")
    _flush(scratch / "state.json")
    _flush(scratch)
    if target.exists():
        _discard(target)
    os.rename(scratch, target)
    _flush(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        _discard(old)
    return target


def latest(folder: Path) -> Path | None:
    """The newest checkpoint; None where there is none. Raises ValueError for a folder among them that is none by its name."""
    found = sorted(folder.glob("step-*"))
    if found:
        round_of(found[-1])
    return found[-1] if found else None


def round_of(place: Path) -> int:
    """The round that a checkpoint's name says. Raises ValueError for what is none by its name."""
    number = place.name.removeprefix("step-")
    if not number.isdigit():
        raise ValueError(f"{place} is no checkpoint: its name ends in no number of rounds; move it elsewhere")
    return int(number)


def inspect(place: Path) -> dict[str, Any]:
    """The state of one checkpoint, its tensors unread. Raises ValueError if it is not whole or from another format."""
    try:
        state = json.loads((place / "state.json").read_text())
        if state["format"] != FORMAT:
            raise ValueError(
                f"{place} has checkpoint format {state['format']}, this fewstep reads {FORMAT}; use the version that wrote it"
            )
        for name, size in state["files"].items():
            if (place / name).stat().st_size != size:
                raise OSError(f"{name} is {(place / name).stat().st_size} bytes long, {size} were written")
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(place, error) from error
    return state


def load(place: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(files, state) of one checkpoint. Raises ValueError if it is not whole or from another format."""
    state = inspect(place)
    try:
        return {name.removesuffix(".safetensors"): load_file(place / name) for name in state["files"]}, state
    except (OSError, SafetensorError) as error:
        raise _damaged(place, error) from error


def _damaged(place: Path, error: Exception) -> ValueError:
    return ValueError(f"checkpoint {place} is damaged ({error}); remove that folder to go on from the one before it")


def _discard(place: Path) -> None:
    """Removes a checkpoint in two steps, so that a half-removed one is never taken for whole."""
    trash = place.with_name(f".removing-{place.name}")
    os.rename(place, trash)
    shutil.rmtree(trash)


def _flush(place: Path) -> None:
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
