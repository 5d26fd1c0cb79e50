"""`fewstep sample`: a folder of pictures with a manifest, and one grid."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from huggingface_hub import try_to_load_from_cache
from PIL import Image

from fewstep import proof
from fewstep.api import Run
from fewstep.data import read_prompts
from fewstep.evaluation.images import MANIFEST, save_folder
from fewstep.exported import Exported, is_export
from fewstep.families import family_of
from fewstep.folders import check_free, pipeline_name, teacher_folder

UNASKED = 4  # pictures of a teacher that takes no prompt, where nobody says how many


def draw(
    target: Path, given: list[str], source: str | None, steps: list[int], compare: bool, seed: int, count: int | None, out: Path
) -> Path:
    """Draws the student (and teacher) of a run, or an export, for the prompts, or `count` pictures where its teacher takes none;
    returns the folder with grid.png and one folder of PNGs a row, whose pictures take the place of an earlier call's.

    Raises ValueError where there is no prompt, the folder holds other files, or an export is to be compared with its teacher."""
    if str(target).startswith("zoo:"):
        raise ValueError(
            f"{target} is a teacher, and students are drawn: `fewstep sample RUN --compare-teacher` draws a run's beside it"
        )
    if source and Path(source).expanduser().is_dir():
        raise ValueError(f"{source} is a folder; give a file of prompts, a .txt, .jsonl or .csv")
    prompts = given + (read_prompts(source)[:count] if source else [])
    if not prompts and wordless(target):
        prompts = [""] * (count or UNASKED)
    if not prompts:
        raise ValueError("nothing to draw; give --prompt TEXT or --prompts FILE")
    check_free(out)
    if out.exists() and any(out.iterdir()) and not (out / "grid.png").exists():
        raise ValueError(f"{out} holds other files; name an empty folder with --out")
    stale = earlier(out)
    rows = {}
    student: Run | Exported
    if is_export(target):
        if compare:
            raise ValueError(
                f"{target} is an export, which has no teacher beside it; leave --compare-teacher away, or name the run"
            )
        student = Exported(target)
        own = student.facts["steps"]
    else:
        student = Run(target)
        own = student.config.objective.steps
        if compare:
            rows["teacher-50"] = student.sample_teacher(prompts, 50, seed, bar="teacher, 50 steps")
    for n in steps or [own]:
        rows[f"student-{n}"] = student.sample(prompts, n, seed, bar=f"student, {n} steps")
    for file in stale:
        file.unlink(missing_ok=True)
        if not any(file.parent.iterdir()):
            file.parent.rmdir()
    for name, images in rows.items():
        save_folder(out / name, images, prompts=prompts, seeds=[seed] * len(prompts))
    Image.fromarray(grid([images[:16] for images in rows.values()])).save(out / "grid.png")
    return out / "grid.png"


def wordless(target: Path) -> bool:
    """Whether a run or an export draws without prompts or classes. Nothing is loaded: of a hub id the cache is asked, and where
    that does not know it, it wants prompts. Raises ValueError for what is neither, or damaged."""
    if is_export(target):
        try:
            return not any(family_of(proof.stated(target)["base_pipeline"]).examples)
        except proof.Broken as error:
            raise ValueError(f"{target}: {error}") from error
    path = Run(target).config.teacher.path
    folder = teacher_folder(path)
    if folder is None:
        index = try_to_load_from_cache(path, "model_index.json")
        if not isinstance(index, str):
            return False
        folder = Path(index).parent
    family = family_of(pipeline_name(folder))
    if any(family.examples):
        return False
    config = folder / family.component / "config.json"
    return not (config.is_file() and json.loads(config.read_text("utf-8")).get("num_class_embeds"))


def earlier(out: Path) -> list[Path]:
    """What an earlier call has left in a folder: the pictures that its manifests list, and those. Raises ValueError for a
    manifest that is damaged."""
    found: list[Path] = []
    for manifest in sorted(out.glob(f"[st]*-*/{MANIFEST}")):
        try:
            names = [json.loads(line)["file"] for line in manifest.read_text("utf-8").splitlines()]
            found += [manifest.parent / Path(name).name for name in names]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest} is damaged, so nobody can say which pictures are old; name another --out") from error
        found.append(manifest)
    return found


def grid(rows: list[np.ndarray], gap: int = 2) -> np.ndarray:
    """Rows of pictures (n, h, w, 3) as one white-ruled sheet (uint8)."""
    h, w = rows[0].shape[1:3]
    sheet = np.full((len(rows) * (h + gap) - gap, max(len(r) for r in rows) * (w + gap) - gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet[i * (h + gap) : i * (h + gap) + h, j * (w + gap) : j * (w + gap) + w] = image
    return sheet
