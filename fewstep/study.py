"""A config brought to life: the one place where teacher, roles, and how the student is deployed, are joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fewstep.adapters import Teacher, load_teacher
from fewstep.config import Config
from fewstep.data import Pairs, digest
from fewstep.denoiser import Cond, Denoiser, Guided
from fewstep.experts import PhasedExperts, along
from fewstep.heads import Discriminator
from fewstep.networks import Role
from fewstep.objectives import Nets
from fewstep.objectives.ranges import check_fed
from fewstep.painting import generate
from fewstep.pixels import looking
from fewstep.preview import Preview
from fewstep.roles import roles_of
from fewstep.sampling import STEPS
from fewstep.slim import try_out
from fewstep.walks import Walk, as_deployed, guidance_of, walk_of


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
        return guidance_of(self.teacher, self.config)

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


def open_study(config: Config, device: str = "cpu") -> Study:
    """Loads the teacher and makes the roles. Raises ValueError for what cannot work, before any training."""
    study = study_of(
        config, load_teacher(config.teacher.path, device, size=config.teacher.size, guidance=config.teacher.guidance)
    )
    if config.student.network:
        try_out(study.student(study.roles["student"]), study.teacher.latent_shape, study.null)
    return study


def study_of(config: Config, teacher: Teacher) -> Study:
    """The roles of a config on its teacher's network."""
    walk, needs = walk_of(teacher, config), config.objective.needs
    check_fed(needs.scales, guidance_of(teacher, config), embedded=teacher.family.embedded, mixes=needs.mixes)
    return Study(config, teacher, roles_of(config, teacher), walk)
