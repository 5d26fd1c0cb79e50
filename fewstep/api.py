"""The Python API, and the one place where teacher, roles, data, objective and trainer are joined."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep import checkpoint, identity
from fewstep.adapters import Teacher, load_teacher
from fewstep.config import Config, parse
from fewstep.data import Pairs, default_cache, digest, open_source
from fewstep.denoiser import Cond, Denoiser, Guided
from fewstep.experts import PhasedExperts, along
from fewstep.exported import wanted_steps
from fewstep.heads import Discriminator
from fewstep.networks import Role, set_weights
from fewstep.objectives import Nets
from fewstep.objectives.ranges import check_fed
from fewstep.painting import generate
from fewstep.pixels import looking
from fewstep.plain import stepped
from fewstep.preview import Preview
from fewstep.roles import roles_of
from fewstep.sampling import STEPS
from fewstep.slim import try_out
from fewstep.stages import Stage, claimed, find, stages_of, store
from fewstep.trainer import Job, fit, make_accelerator, runs_on_cpu
from fewstep.verify import Report, verify
from fewstep.walks import Walk, as_deployed, walk_of

Place = str | Path
Part = str | Mapping[str, Any]  # the name that a part of a config turns on, or the whole part


@dataclass(frozen=True)
class Study:
    """A config brought to life: its teacher with guidance, its roles, and how its student will be deployed."""

    config: Config
    teacher: Teacher
    roles: dict[str, Role | PhasedExperts]
    walk: Walk

    @property
    def sampler(self) -> str:
        return self.walk.sampler

    @property
    def grid(self) -> tuple[float, ...]:
        return self.walk.grid

    @property
    def guidance(self) -> float:
        return _guidance(self.teacher, self.config)

    @property
    def device(self) -> torch.device:
        return next(self.teacher.net.parameters()).device

    @cached_property
    def deployed(self) -> Teacher:
        """The teacher's pipeline as the student is deployed in it."""
        return as_deployed(self.teacher, self.config)

    @cached_property
    def null(self) -> Cond:
        """The condition for "no prompt", on the CPU."""
        return self.teacher.null()

    def guided(self, net: nn.Module) -> Denoiser | Guided:
        """A role (possibly wrapped) as the guided teacher."""
        return self.teacher.guided(net, self.guidance, self.null.to(self.device))

    def player(self, net: nn.Module, grid: tuple[float, ...] = ()) -> Denoiser:
        """A role (possibly wrapped) as it is, deployed on a grid."""
        return self.teacher.denoiser(net, self.guidance, grid or self.grid)

    def student(self, net: nn.Module, grid: tuple[float, ...] = ()) -> Denoiser:
        """The student's role (possibly wrapped), deployed on a grid; its experts, if it has some, in their places."""
        role = self.roles["student"]
        if not isinstance(role, PhasedExperts):
            return self.player(net, grid)
        return along(self.player(role.experts[0], grid), net, self.grid, self.config.phases)

    def nets(self, modules: Mapping[str, nn.Module]) -> Nets:
        """The players as the objective sees them."""
        critic, average = (self.player(modules[name]) if name in modules else None for name in ("critic", "average"))
        judge, heads = None, self.config.objective.needs.heads
        if "heads" in modules:
            taps, eyes = heads.taps_on(self.roles[heads.backbone].net), self.player(modules[heads.backbone])
            judge = Discriminator(looking(eyes, heads), taps, modules["heads"])
        student, teacher, weighting = self.student(modules["student"]), self.teaching(modules), modules.get("weighting")
        step, finer = STEPS[self.sampler], self.walk.finer.__getitem__
        return Nets(student, teacher, self.grid, step, critic, judge, average, weighting, finer=finer)

    def teaching(self, modules: Mapping[str, nn.Module]) -> Denoiser | Guided:
        """The guided teacher, or the earlier student that teaches, which what taught it has guided, or which is fed its scale."""
        if "tutor" not in modules:
            return self.guided(modules["teacher"])
        tutor = self.player(modules["tutor"])
        return tutor if tutor.guidance is not None else Guided(tutor, 1.0, self.null.to(self.device))

    def pairs(self, tutor: Config | None = None) -> Pairs | None:
        """The samples that the objective learns from, where it does: the teacher's, or the tutor's, given what that was taught.

        Those that only stand for images are the teacher's whoever teaches: no student is nearer to the data."""
        data, needs = self.config.data, self.config.objective.needs
        if not (data.pairs and (needs.pairs or needs.images)):
            return None
        if tutor is None or needs.originals or not needs.pairs:
            return Pairs(self.guided(self.roles["teacher"]), data.pairs, data.pairs_steps)
        known = f"{self.config.student_kind()} {digest(self.roles['tutor'].weights())}"
        return Pairs(self.teaching(self.roles), data.pairs, data.pairs_steps, walk_of(self.teacher, tutor).sampler, known)

    def encoded(self, painting: bool) -> None:
        """Lets go of the text encoders, as all is encoded, and of the autoencoder where no picture is drawn or judged."""
        _ = self.null
        self.teacher.keep(*(("vae",) if painting or "pixels" in self.roles else ()))

    def draw_student(self, cond: Cond, steps: int, seed: int = 0, bar: str = "") -> np.ndarray:
        """The student's pictures uint8 (n, h, w, 3), with the weights its role has now."""
        times = self.deployed.grid(steps, self.sampler)
        student = self.student(self.roles["student"], times)
        return generate(self.teacher, student, cond, times, self.sampler, seed=seed, bar=bar)

    def draw_teacher(self, cond: Cond, steps: int, seed: int = 0, bar: str = "") -> np.ndarray:
        """The guided teacher's pictures uint8 (n, h, w, 3)."""
        times, guided = self.teacher.grid(steps, "ddim"), self.guided(self.roles["teacher"])
        return generate(self.teacher, guided, cond, times, "ddim", seed=seed, bar=bar)

    def steps(self) -> tuple[int, ...]:
        """The step counts a student is looked at: its own, and, where it draws in others, 1, 2, 4."""
        return tuple(sorted({self.config.objective.steps, *(() if self.config.objective.samplers == () else (1, 2, 4))}))

    def preview(self, cond: Cond, folder: Path) -> Preview:
        """Pictures of the student, in all of `steps`, beside the teacher's."""
        teacher, student = partial(self.draw_teacher, cond, 50), partial(self.draw_student, cond)
        return Preview(self.roles["student"], teacher, student, self.steps(), self.config.objective.steps, folder)


def open_study(config: Config) -> Study:
    """Loads the teacher and makes the roles. Raises ValueError for what cannot work, before any training."""
    study = study_of(config, load_teacher(config.teacher.path, size=config.teacher.size, guidance=config.teacher.guidance))
    if config.student.network:
        try_out(study.student(study.roles["student"]), study.teacher.latent_shape, study.null)
    return study


def study_of(config: Config, teacher: Teacher) -> Study:
    """The roles of a config on its teacher's network."""
    walk, needs = walk_of(teacher, config), config.objective.needs
    check_fed(needs.scales, _guidance(teacher, config), embedded=teacher.family.embedded, mixes=needs.mixes)
    return Study(config, teacher, roles_of(config, teacher), walk)


def _guidance(teacher: Teacher, config: Config) -> float:
    return teacher.guidance if config.teacher.guidance is None or teacher.family.embedded else config.teacher.guidance


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
    config = stage.config
    study = open_study(config)
    parts = config.phases > 1 or config.objective.needs.partly or len(study.teacher.components) > 1
    accelerator = make_accelerator(config.train, partly=parts)
    for part in whole.stages:
        walk_of(study.teacher, part)  # refused now, not when its turn comes
    stage.begin(study.roles)
    for name in {"teacher", "tutor"} & study.roles.keys():  # who draws pairs
        study.roles[name].net.to(accelerator.device)
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
    known = {"grid": list(study.grid), "sampler": study.sampler, "data": learned}
    preview = study.preview(study.teacher.resized(source.first(8)), stage.folder / "grids")
    fit(
        Job(config.objective, study.roles, study.nets, source, stage.settings, stage.folder, known, preview),
        resume=resume,
        accelerator=accelerator,
    )


class Run:
    """A finished (or interrupted) run folder, or one stage of it: what can be drawn, exported and judged from it.

    The student of a run of stages is the last stage's, its teacher the one on the path."""

    def __init__(self, folder: Place) -> None:
        self.folder = Path(folder)
        self.config, self.last = find(self.folder)

    @cached_property
    def place(self) -> Path:
        """The newest checkpoint."""
        found = self.last.place
        if found is None:
            raise ValueError(f"the run at {self.folder} has no checkpoint yet; `fewstep train ... --resume` goes on with it")
        return found

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The student's averaged weights."""
        return checkpoint.load(self.place)[0]["ema"]

    @cached_property
    def study(self) -> Study:
        study = open_study(self.config.judged())
        set_weights(study.roles["student"], self.weights)
        return study

    def sample(self, prompts: Sequence[str], steps: int | None = None, seed: int = 0, bar: str = "") -> np.ndarray:
        """The student's pictures uint8 (n, h, w, 3), in the steps it was trained for if none are given."""
        count = wanted_steps(steps, self.config.objective.steps)
        return self.study.draw_student(self.study.teacher.encode(prompts), count, seed, bar)

    def sample_teacher(self, prompts: Sequence[str], steps: int = 50, seed: int = 0, bar: str = "") -> np.ndarray:
        """The guided teacher's pictures from the same noise."""
        return self.study.draw_teacher(self.study.teacher.encode(prompts), wanted_steps(steps, 50), seed, bar)

    def export(self, to: Place, *, form: str | None = None, layout: str | None = None) -> Path:
        """Writes what stock Diffusers (or ComfyUI) loads; see `fewstep.export`."""
        from fewstep.export import export

        record: dict[str, Any] = {"config": self.config.model_dump(mode="json"), "round": int(self.place.name.split("-")[1])}
        results = self.folder / "results.json"
        if results.exists():
            record["results"] = json.loads(results.read_text())
        wish = self.config.teacher  # loaded afresh: the study's network carries the adapters
        return export(
            as_deployed(load_teacher(wish.path, size=wish.size, guidance=wish.guidance), self.config),
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

    def evaluate(self, protocol: str, steps: Sequence[int] = (), *, fresh: bool = False, teacher: bool = True) -> dict[str, Any]:
        """Scores the run, writes results.json and returns what is in it; see `fewstep.judging`."""
        judging = import_module("fewstep.judging")  # it draws with runs, and so lies above this file
        return judging.evaluate(self.folder, protocol, out=None, steps=list(steps), fresh=fresh, teacher=teacher)[0]


def distill(
    *, teacher: Place, objective: Part, data: Part | Path, steps: int = 4, out: Place = "runs/distilled", **settings: Any
) -> Run:
    """Distils a teacher in one call. `data` is a source of prompts, or of images where the objective needs them, or that part of
    a config; `settings` are further parts (student=..., critic=..., train=...)."""
    from fewstep.objectives import objectives

    chosen = {"name": objective} if isinstance(objective, str) else dict(objective)
    kind = objectives().get(chosen["name"])
    source = "images" if kind is not None and kind().needs.images else "prompts"
    found = {source: str(data)} if isinstance(data, (str, Path)) else dict(data)
    tree = {"teacher": {"path": str(teacher)}, "objective": stepped(chosen, steps), "data": found, **settings}
    return train(parse(tree), Path(out))
