"""The Python API, and the one place where study, data and trainer are joined."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fewstep import checkpoint, identity
from fewstep.config import Config
from fewstep.data import default_cache, open_source
from fewstep.devices import default_device
from fewstep.evaluation.results import measured
from fewstep.export import export
from fewstep.exported import wanted_prompts, wanted_steps
from fewstep.networks import set_weights
from fewstep.stages import Stage, absolute, claimed, find, stages_of, store
from fewstep.study import Study, open_study
from fewstep.trainer import Job, fit, make_accelerator, runs_on_cpu
from fewstep.verify import Report, verify
from fewstep.walks import as_deployed, teacher_of, walk_of

Place = str | Path


def train(config: Config, folder: Path, *, resume: bool = False) -> Run:
    """Trains a config into a run folder. Raises ValueError where the folder holds another run, or resume would change it."""
    for part in config.stages or (config,):
        if runs_on_cpu(part.train) and part.teacher.storage == "host":
            raise ValueError("teacher.storage: host is for a GPU to fetch weights from host memory; on the CPU leave it away")
    with claimed(config, folder, resume):
        for stage in stages_of(config, folder):
            if not stage.finished:
                _train_stage(config, stage, folder, resume=resume)
    return Run(folder)


def _train_stage(whole: Config, stage: Stage, folder: Path, *, resume: bool) -> None:
    config, study = stage.config, open_study(stage.config)
    parts = config.phases > 1 or config.objective.needs.partly or len(study.teacher.components) > 1
    accelerator = make_accelerator(config.train, partly=parts)
    for part in whole.stages:
        walk_of(study.teacher, part)  # refused now, not when its turn comes
    tutored = identity.taught(study.teacher, study.guidance, absolute(config).teacher.path, stage.taught if resume else None)
    stage.begin(study.roles)
    study.teacher.pipe.to(accelerator.device)  # what encodes prompts and images, and draws pairs
    if "tutor" in study.roles:
        study.roles["tutor"].net.to(accelerator.device)
    source = open_source(
        study.teacher,
        prompts=config.data.prompts,
        images=config.data.images,
        images_needed=config.objective.needs.images,
        pairs=study.pairs(stage.tutor.config if stage.tutor else None),
        aspect=config.data.aspect,
        cache=default_cache(),
        progress=True,
    )
    learned = identity.content(source, stage.place if resume else None)
    study.encoded(painting=accelerator.is_main_process)
    if accelerator.is_main_process:
        store(whole, folder)
    known = {"grid": list(study.grid), "sampler": study.sampler, "data": learned, "teacher": tutored}
    preview = study.preview(study.teacher.resized(source.first(8)), stage.folder / "grids")
    fit(
        Job(config.objective, study.roles, study.nets, source, stage.settings, stage.folder, known, preview),
        resume=resume,
        accelerator=accelerator,
    )


class Run:
    """A finished (or interrupted) run folder, or a stage or checkpoint of it: what can be drawn, exported and judged from it.

    The student of a run of stages is the last stage's, its teacher the one on the path."""

    def __init__(self, folder: Place) -> None:
        self.folder = Path(folder)
        self.config, self.last = find(self.folder)

    @cached_property
    def place(self) -> Path:
        """The checkpoint itself, or the newest."""
        if (found := self.last.place) is None:
            raise ValueError(f"the run at {self.folder} has no checkpoint yet; `fewstep train ... --resume` goes on with it")
        return found

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The student's averaged weights."""
        return checkpoint.load(self.place)[0]["ema"]

    @cached_property
    def study(self) -> Study:
        study = open_study(self.config.judged(), "cpu" if self.config.train.device == "cpu" else default_device())
        set_weights(study.roles["student"], self.weights)
        return study

    def sample(self, prompts: str | Iterable[str], steps: int | None = None, seed: int = 0, bar: str = "") -> np.ndarray:
        """The student's pictures uint8 (n, h, w, 3), in the steps it was trained for if none are given."""
        words, count = wanted_prompts(prompts), wanted_steps(steps, self.config.objective.steps)
        return self.study.draw_student(self.study.teacher.encode(words), count, seed, bar)

    def sample_teacher(self, prompts: str | Iterable[str], steps: int = 50, seed: int = 0, bar: str = "") -> np.ndarray:
        """The guided teacher's pictures from the same noise."""
        words, count = wanted_prompts(prompts), wanted_steps(steps, 50)
        return self.study.draw_teacher(self.study.teacher.encode(words), count, seed, bar)

    def export(self, to: Place, *, form: str | None = None, layout: str | None = None) -> Path:
        """Writes what stock Diffusers (or ComfyUI) loads; see `fewstep.export`."""
        reached = self.last.reached(self.place)
        record = {"config": self.config.model_dump(mode="json"), **reached, "results": measured(self.folder, reached)}
        return export(
            as_deployed(teacher_of(self.config), self.config),  # the study's network carries the adapters
            self.config.student_kind(),
            self.weights,
            guidance=self.study.guidance,
            sampler=self.study.sampler,
            steps=self.config.objective.steps,
            phases=self.config.phases,
            counts=self.study.steps(),
            scales=self.config.objective.needs.scales,
            to=Path(to),
            form=form,
            layout=layout,
            record=record,
        )

    def verify(self, export: Place | None = None) -> Report:
        """Proves an export of this run; if none is named, the one that this makes in its folder. See `fewstep.verify`."""
        return verify(export or self.export(self.folder / "export"))

    def evaluate(
        self,
        protocol: str = "inception",
        steps: Sequence[int] = (),
        *,
        reference: Place | None = None,
        prompts: Place | None = None,
        n: int | None = None,
        size: int | None = None,
        fresh: bool = False,
        teacher: bool = True,
    ) -> dict[str, Any]:
        """Scores the run as `fewstep eval` does, writes results.json and returns what is in it; see `fewstep.judging`."""
        judging = import_module("fewstep.judging")  # it draws with runs, and so lies above this file
        given = {"reference": reference, "prompts": prompts, "n": n, "size": size}
        return judging.evaluate(self.folder, protocol, out=None, steps=list(steps), fresh=fresh, teacher=teacher, given=given)[0]
