"""`fewstep sample`: a folder of pictures with a manifest, and one grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.api import Run
from fewstep.data import read_prompts
from fewstep.evaluation.images import save_folder
from fewstep.exported import Exported, is_export


def draw(
    target: Path, given: list[str], source: str | None, steps: list[int], compare: bool, seed: int, count: int | None, out: Path
) -> Path:
    """Draws the student (and teacher) of a run, or an export, for the prompts; returns the folder with grid.png and one folder of
    PNGs a row.

    Raises ValueError where there is no prompt, the folder holds other files, or an export is to be compared with its teacher."""
    prompts = given + (read_prompts(source)[:count] if source else [])
    if not prompts:
        raise ValueError("nothing to draw; give --prompt TEXT or --prompts FILE")
    if out.exists() and any(out.iterdir()) and not (out / "grid.png").exists():
        raise ValueError(f"{out} holds other files; name an empty folder with --out")
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
    for name, images in rows.items():
        save_folder(out / name, images, prompts=prompts, seeds=[seed] * len(prompts))
    Image.fromarray(grid([images[:16] for images in rows.values()])).save(out / "grid.png")
    return out / "grid.png"


def grid(rows: list[np.ndarray], gap: int = 2) -> np.ndarray:
    """Rows of pictures (n, h, w, 3) as one white-ruled sheet (uint8)."""
    h, w = rows[0].shape[1:3]
    sheet = np.full((len(rows) * (h + gap) - gap, max(len(r) for r in rows) * (w + gap) - gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet[i * (h + gap) : i * (h + gap) + h, j * (w + gap) : j * (w + gap) + w] = image
    return sheet
