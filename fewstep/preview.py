"""What a student draws while it is trained, beside its teacher: a picture to look at, and numbers to log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from fewstep.experts import PhasedExperts
from fewstep.monitor import compare
from fewstep.networks import Role, swapped


class Preview:
    """Grids of the same prompts and noise through a run: the teacher's row, then the student at some step counts. Returns how the
    student's row at its `own` steps compares with the teacher's.

    teacher, student: draw uint8 (N, H, W, 3), with steps for the student; the teacher is asked once."""

    def __init__(
        self,
        role: Role | PhasedExperts,
        teacher: Callable[[], np.ndarray],
        student: Callable[[int], np.ndarray],
        steps: Sequence[int],
        own: int,
        folder: Path,
    ) -> None:
        self.role, self.teacher, self.student, self.steps, self.own, self.folder = role, teacher, student, steps, own, folder
        self.top: np.ndarray | None = None

    def __call__(self, done: int, weights: Mapping[str, Tensor]) -> dict[str, float]:
        from PIL import Image

        if self.top is None:
            self.top = self.teacher()
        with swapped(self.role, weights):
            drawn = {n: self.student(n) for n in self.steps}
        self.folder.mkdir(parents=True, exist_ok=True)
        page = np.concatenate([np.concatenate(list(line), 1) for line in (self.top, *drawn.values())], 0)
        Image.fromarray(page).save(self.folder / f"round-{done:07d}.png")
        return compare(drawn[self.own], self.top)
