"""An export as it is deployed: its own pipeline draws, where a run would be asked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep import proof
from fewstep.deploy import check_count
from fewstep.devices import default_device
from fewstep.families import family_of
from fewstep.progress import track
from fewstep.stream import rows
from fewstep.verify import base_of

BATCH = 64


def is_export(folder: Path) -> bool:
    """Whether a folder is what `fewstep export` wrote."""
    return (folder / "fewstep.json").is_file()


def wanted_steps(steps: int | None, trained: int) -> int:
    """The step count to draw in: the trained one where none is given. Raises ValueError below 1."""
    count = trained if steps is None else steps
    if count < 1:
        raise ValueError(f"nothing can be drawn in {count} steps; give at least 1, or leave --steps away for {trained}")
    return count


def wanted_prompts(prompts: str | Iterable[str]) -> list[str]:
    """The prompts to draw; a string is one. Raises ValueError where there is none."""
    found = [prompts] if isinstance(prompts, str) else list(prompts)
    if not found:
        raise ValueError("there is no prompt to draw; give at least one")
    return found


class Exported:
    """The pipeline of an export, in float32, on a GPU where there is one. Raises ValueError where the folder, or a LoRA's
    teacher, is not whole."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self.facts: dict[str, Any] = proof.read(self.folder)
            if self.facts["runs_by"]:
                proof.own_pipeline(self.folder, self.facts["runs_by"])
            self.pipe = proof.load(self.folder, self.facts, base_of(self.folder)).to(default_device())
        except proof.Broken as error:
            raise ValueError(f"{self.folder}: {error}") from error

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that were proved."""
        return tuple(sorted(map(int, self.facts["times"])))

    def sample(self, prompts: str | Iterable[str], steps: int | None = None, seed: int = 0, bar: str = "") -> np.ndarray:
        """The student's pictures uint8 (n, h, w, 3), of a video its middle frame, from the noise that its run would draw them
        from. Raises ValueError for a step count in which it does not draw."""
        steps, words = wanted_steps(steps, self.facts["steps"]), wanted_prompts(prompts)
        if self.counts == (1,) and steps > 1:
            raise ValueError(f"{self.folder} draws in one step alone, not in {steps}; leave --steps away")
        family, parts = family_of(self.facts["base_pipeline"]), []
        for start in track(range(0, len(words), BATCH), bar, len(words), each=BATCH, active=bool(bar)):
            part = words[start : start + BATCH]
            noise = rows(seed, start, start + len(part)).generators
            call = {**self.facts["call"], **family.ask(self.pipe, part), "num_inference_steps": steps}
            call |= family.spacing(self.facts["sampler"], steps)
            with torch.random.fork_rng():
                torch.manual_seed(seed + start)  # some pipelines hand their scheduler no generator, and it draws from this one
                try:
                    drawn = self.pipe(**call, generator=noise, output_type="np")
                except ValueError:
                    check_count(self.pipe.scheduler, steps)
                    raise
            images = drawn.images if "images" in drawn else drawn.frames[:, drawn.frames.shape[1] // 2]
            parts.append((images * 255).round().astype(np.uint8))
        return np.concatenate(parts)
