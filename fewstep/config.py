"""A run as one strict YAML file: every key is known, every default is written out in the run folder."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator

from fewstep.networks import Full, Lora, expert_names
from fewstep.objectives import Objective
from fewstep.plain import (
    check_finite,
    check_keys,
    check_objective,
    check_truths,
    first_fault,
    flat,
    made,
    name_of,
    override,
    read,
    staged,
    told,
)
from fewstep.succession import check_start
from fewstep.trainer import Settings


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherConfig(_Strict):
    """path: zoo:NAME, a Diffusers folder or a hub id. guidance: scale u + g (c - u), 1 is none; None: the family's default.
    size: ([frames,] height, width) in pixels; None: the teacher's own. net: original or, in a stage, previous
    or stage-N: who teaches is the student of the stage before or of that one, as it is, not guided any further; students are
    held against the path's teacher all the same. storage: how the frozen network's matrices are kept, which adapters learn on."""

    path: Annotated[str, AfterValidator(os.path.expanduser)]
    guidance: float | None = None
    size: tuple[int, ...] | None = None
    net: str = "original"
    storage: Literal["whole", "fp8", "int8", "nf4", "host"] = "whole"

    @field_validator("guidance")
    @classmethod
    def _guidance(cls, value: float | None) -> float | None:
        if value is not None and value <= 0:
            raise ValueError(f"the scale must be above 0, not {value:g}: 1 is no guidance, and 0 would teach no prompt at all")
        return value

    @field_validator("net")
    @classmethod
    def _net(cls, value: str) -> str:
        if value not in ("original", "previous") and not re.fullmatch(r"stage-\d+", value):
            raise ValueError(f"who teaches is original, previous or an earlier stage by its name, as in stage-1, not {value!r}")
        return value


class WeightsConfig(_Strict):
    """How a role is trained: adapters on the shared frozen base, or a full copy."""

    weights: Literal["lora", "full"] = "lora"
    rank: int = Field(default=32, ge=1)
    alpha: float | None = Field(default=None, gt=0)

    def kind(self) -> Full | Lora:
        return Full() if self.weights == "full" else Lora(self.rank, self.alpha)


class StudentConfig(WeightsConfig):
    """phases: experts that share the deployed steps among them, in order of time; None: as many as the objective needs. network:
    settings of the teacher's network (the config.json of its folder) in which the student's differs, as in
    {block_out_channels: [32, 48]}; such a student has full weights, which start as a part of its teacher's.
    conditioning_timestep: the timestep at which its network is handed pure noise, where that is not the last of the teacher's
    table: at SDXL's 999 an error of predicted noise is 15 times as large in x0, at 399, DMD2's choice, 1.2 times (arXiv
    2405.14867)."""

    phases: int | None = Field(default=None, ge=1)
    network: dict[str, Any] = {}
    conditioning_timestep: int | None = Field(default=None, ge=1)


class DataConfig(_Strict):
    """Exactly one of: prompts (zoo:sprites or a .txt, .jsonl, .csv file), images (zoo:sprites, or captioned images: a folder,
    webdataset shards, parquet files of a Hugging Face dataset; shards and files by folder, by name or by pattern).

    pairs: how many samples of the teacher's to learn from, drawn once for prompts in pairs_steps steps; they are images, too. In
    a stage that an earlier student teaches, its own (but for flow_guided, which wants the first teacher's), without fresh noise.
    aspect: how many times as long as the other a side may be; 1: all pictures have teacher.size. Above, a batch has one of the
    shapes of about that area: the one nearest to its images' own, or any for prompts."""

    prompts: str | None = None
    images: str | None = None
    pairs: int = Field(0, ge=0)
    pairs_steps: int = Field(50, ge=1)
    aspect: float = Field(1.0, ge=1)


class Config(_Strict):
    """A whole run. stages: of a run of several, each of them whole, in order; the other settings are then those of the last."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    teacher: TeacherConfig
    student: StudentConfig = StudentConfig()
    critic: WeightsConfig = WeightsConfig()
    objective: Any
    data: DataConfig
    train: Settings = Settings()
    stages: tuple[Config, ...] = ()

    def student_kind(self) -> Full | Lora:
        """How the student is trained, with the inputs that the objective gives its network."""
        kind, inputs = self.student.kind(), self.objective.needs.inputs
        return dataclasses.replace(kind, inputs=inputs, network=self.student.network) if isinstance(kind, Full) else kind

    @property
    def phases(self) -> int:
        """Of how many experts the student is made."""
        return self.student.phases or self.objective.needs.phases

    def kinds(self) -> dict[str, Full | Lora]:
        """The roles to build on the teacher's network, and how."""
        wanted = dict.fromkeys(expert_names(self.phases), self.student_kind())
        if self.objective.needs.average is not None:
            wanted["average"] = self.student_kind()
        if self.teacher.net != "original":
            wanted["tutor"] = self.student_kind()
        return wanted | ({"critic": self.critic.kind()} if "critic" in self.objective.needs.roles else {})

    def judged(self) -> Config:
        """What the student is judged as: beside the teacher on the path, whoever taught it."""
        return self.model_copy(update={"teacher": self.teacher.model_copy(update={"net": "original"})})

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, value: Any) -> Objective:
        return value if isinstance(value, Objective) else made(value)

    @field_serializer("objective")
    def _fields(self, value: Objective) -> dict[str, Any]:
        return told(value)

    @field_serializer("stages")
    def _each(self, value: tuple[Config, ...]) -> list[dict[str, Any]]:
        return [stage.model_dump(mode="json", exclude={"stages"}) for stage in value]

    def dump(self) -> str:
        """The complete YAML, defaults written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file with `a.b=c` overrides. Raises ValueError, in a sentence, for whatever is wrong with it."""
    tree = read(Path(path))
    for text in overrides:
        override(tree, text)
    return parse(tree)


def parse(tree: Mapping[str, Any]) -> Config:
    """A config from plain data. Raises ValueError naming the first unknown, missing or wrong setting and a remedy."""
    parts = [name for name in Config.model_fields if name != "stages"]
    check_keys(tree, Config.model_fields, "")
    if not tree.get("stages"):
        return _parsed({k: v for k, v in tree.items() if k != "stages"})
    found: list[Config] = []
    for i, stage in enumerate(staged(tree, parts), 1):
        try:
            found.append(_parsed(stage, found))
        except ValueError as error:
            raise ValueError(f"stages.{i}: {error}") from error
    return found[-1].model_copy(update={"stages": tuple(found)})


def _parsed(tree: Mapping[str, Any], before: Sequence[Config] = ()) -> Config:
    """A config; before: the stages that it comes after."""
    for part, kind in (("teacher", TeacherConfig), ("student", StudentConfig), ("critic", WeightsConfig), ("data", DataConfig)):
        check_keys(tree.get(part, {}), kind.model_fields, part)
    check_keys(tree.get("train", {}), [f.name for f in dataclasses.fields(Settings)], "train")
    check_objective(tree.get("objective"), "objective")
    try:
        config = Config.model_validate(dict(tree))
    except ValidationError as error:
        raise ValueError(first_fault(error)) from error
    check_finite(config.model_dump())
    check_truths(tree, config.model_dump())
    if (config.data.prompts is None) == (config.data.images is None):
        raise ValueError("data needs exactly one of prompts and images, as in data: {prompts: zoo:sprites}")
    if config.data.pairs and config.data.images is not None:
        raise ValueError("data.pairs are drawn by the teacher for data.prompts; give those in place of data.images")
    if config.data.aspect > 1:
        from fewstep.shapes import check_aspect  # it knows Diffusers, which takes seconds to import

        check_aspect(config.teacher.path)
    needs, name = config.objective.needs, name_of(config.objective)
    if needs.inputs and config.student.weights != "full":
        raise ValueError(
            f"objective {name}, set like this, feeds the student's network the {' and the '.join(needs.inputs)}, "
            "for which it needs weights of its own: set student: {weights: full}"
        )
    if config.student.network and config.student.weights != "full":
        raise ValueError("student.network makes a network of its own, which a LoRA cannot be: set student.weights: full")
    kinds, followed = config.kinds(), any(turn.followers for turn in config.objective.round(0))
    if (needs.inputs or needs.average is not None or followed) and config.phases > 1:
        raise ValueError(
            f"objective {name}, set like this, wants a student of one network, not of {config.phases} experts: "
            "leave student.phases away"
        )
    for turn in config.objective.round(0):
        for role in turn.followers:
            if role not in kinds or kinds[role] != kinds.get(turn.player):
                raise ValueError(
                    f"the {role} follows the {turn.player}, so both need the same weights: "
                    f"write the same settings under {turn.player} and {role}"
                )
    if needs.phases not in (1, config.phases):
        raise ValueError(f"objective {name} is set to {needs.phases} phases; leave student.phases away, or set it to the same")
    if config.objective.steps % config.phases:
        raise ValueError(
            f"student.phases: {config.objective.steps} steps cannot be shared out over {config.phases} experts; choose a divisor"
        )
    if config.train.rounds < needs.rounds:
        raise ValueError(
            f"train.rounds: objective {name}, set like this, needs at least {needs.rounds} rounds, not {config.train.rounds}"
        )
    if "heads" in needs.roles and not any("heads" in turn.movers for k in range(100) for turn in config.objective.round(k)):
        raise ValueError(
            f"objective {name}, set like this, needs heads that nobody trains; "
            f"wrap it, as in objective: {{name: adversarial, inner: {{name: {name}, ...}}}}"
        )
    if needs.pairs and not config.data.pairs:
        raise ValueError(
            f"objective {name} needs pairs of noise and the teacher's sample from it: "
            "add data.pairs, as in data: {prompts: zoo:sprites, pairs: 2000}"
        )
    if needs.images and config.data.images is None and not config.data.pairs:
        raise ValueError(
            f"objective {name} needs images: add data.images (a folder, or zoo:sprites) in place of data.prompts, "
            "or data.pairs beside them"
        )
    if config.student.conditioning_timestep is not None and not config.objective.walks:
        raise ValueError(
            f"student.conditioning_timestep: objective {name} asks its student at the time of its input's noise; leave it away"
        )
    check_start(config, before)
    return config


def differences(old: Config, new: Config, free: Sequence[str] = ()) -> list[str]:
    """Dotted names of settings in which two configs differ, but for the `free` ones."""
    a, b = (flat(c.model_dump(mode="json")) for c in (old, new))
    return sorted(k for k in {*a, *b} if a.get(k) != b.get(k) and k not in free)


ATTENTION = {"sdpa": "native", "math": "native", "xformers": "xformers", "flash": "flash"}
