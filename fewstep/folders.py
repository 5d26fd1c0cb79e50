"""Where a teacher lies, and what may be read there: safetensors and JSON, never a pickle."""

from __future__ import annotations

import json
from pathlib import Path

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def teacher_folder(path: str) -> Path | None:
    """The local folder a teacher path names, or None for a hub id.

    Raises ValueError for one that is not there, is no pipeline, or holds a pickle."""
    if path.startswith("zoo:"):
        from fewstep.zoo import folder

        place = folder(path.removeprefix("zoo:"))
    else:
        place = Path(path).expanduser()
    if not place.exists():
        # Where the first part is a folder here, the second is a name in it.
        if path.count("/") == 1 and not path.startswith((".", "/", "~")) and not place.parent.is_dir():
            return None
        raise ValueError(f"there is no teacher at {path}; give zoo:NAME, a Diffusers folder, or a hub id such as owner/model")
    if not (place / "model_index.json").exists():
        remedy = (
            "`fewstep list teachers` names those of the zoo" if path.startswith("zoo:") else "pipe.save_pretrained writes one"
        )
        raise ValueError(f"{path} is not a Diffusers pipeline folder: it has no model_index.json ({remedy})")
    unsafe = [f for f in place.rglob("*") if f.suffix in PICKLES]
    if unsafe:
        raise ValueError(
            f"{unsafe[0]} is a pickle, which can run code when read; pipe.save_pretrained writes safetensors instead"
        )
    return place


def exported_guidance(folder: Path) -> float | None:
    """The scale that the student exported to a folder is fed, 1 for one that needs no guidance; None where no student lies.

    Raises ValueError for a damaged record."""
    if not (folder / "fewstep.json").is_file():
        return None
    try:
        scales = json.loads((folder / "fewstep.json").read_text("utf-8")).get("scales")
        return float(scales["at"]) if scales and not scales["folded"] else 1.0
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'fewstep.json'} is damaged; export the student again") from error


def pipeline_name(folder: Path) -> str:
    """The pipeline class of a Diffusers folder. Raises ValueError if its index does not say."""
    try:
        return json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'model_index.json'} is damaged; save the pipeline again with pipe.save_pretrained"
        ) from error


def check_free(folder: Path) -> None:
    """Raises ValueError where a folder cannot be made, because a file is in its way."""
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is a file; name a folder with --out")
