"""A run as one strict YAML file: every key is known, every default is written out in the run folder."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_serializer, field_validator

from fewstep.networks import Full, Lora, expert_names
from fewstep.objectives import Objective, objectives
from fewstep.trainer import Settings


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherConfig(_Strict):
    """path: zoo:NAME, a Diffusers folder or a hub id. guidance: scale u + g (c - u), 1 is none; None: the family's default.
    size: ([frames,] height, width) in pixels; None: the teacher's own."""

    path: str
    guidance: float | None = None
    size: tuple[int, ...] | None = None


class WeightsConfig(_Strict):
    """How a role is trained: adapters on the shared frozen base, or a full copy."""

    weights: Literal["lora", "full"] = "lora"
    rank: int = 32
    alpha: float | None = None

    def kind(self) -> Full | Lora:
        return Full() if self.weights == "full" else Lora(self.rank, self.alpha)


class StudentConfig(WeightsConfig):
    """phases: experts that share the deployed steps among them, in order of time; None: as many as the objective needs."""

    phases: int | None = Field(default=None, ge=1)


class DataConfig(_Strict):
    """Exactly one of: prompts (zoo:sprites or a .txt, .jsonl, .csv file), images (zoo:sprites, or captioned images: a folder,
    webdataset shards, parquet files of a Hugging Face dataset; shards and files by folder, by name or by pattern).

    pairs: how many samples of the teacher's to learn from, drawn once for prompts in pairs_steps steps; they are images, too."""

    prompts: str | None = None
    images: str | None = None
    pairs: int = Field(0, ge=0)
    pairs_steps: int = Field(50, ge=1)


class Config(_Strict):
    """A whole run."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    teacher: TeacherConfig
    student: StudentConfig = StudentConfig()
    critic: WeightsConfig = WeightsConfig()
    objective: Any
    data: DataConfig
    train: Settings = Settings()

    def student_kind(self) -> Full | Lora:
        """How the student is trained, with the inputs that the objective gives its network."""
        kind, inputs = self.student.kind(), self.objective.needs.inputs
        return dataclasses.replace(kind, inputs=inputs) if isinstance(kind, Full) else kind

    @property
    def phases(self) -> int:
        """Of how many experts the student is made."""
        return self.student.phases or self.objective.needs.phases

    def kinds(self) -> dict[str, Full | Lora]:
        """The roles to build on the teacher's network, and how."""
        wanted = dict.fromkeys(expert_names(self.phases), self.student_kind())
        if self.objective.needs.average is not None:
            wanted["average"] = self.student_kind()
        return wanted | ({"critic": self.critic.kind()} if "critic" in self.objective.needs.roles else {})

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, value: Any) -> Objective:
        return value if isinstance(value, Objective) else _made(value)

    @field_serializer("objective")
    def _fields(self, value: Objective) -> dict[str, Any]:
        return _told(value)

    def dump(self) -> str:
        """The complete YAML, defaults written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _made(tree: Mapping[str, Any]) -> Objective:
    """The objective that checked plain data name; one that wraps another holds it as a field."""
    values = {k: v for k, v in tree.items() if k != "name"}
    if "inner" in values:
        try:
            values["inner"] = _made(values["inner"])
        except ValueError as error:
            raise ValueError(f"inner: {error}") from error
    try:
        return TypeAdapter(objectives()[tree["name"]]).validate_python(values)
    except ValidationError as error:  # nested, its message would be a paragraph
        raise ValueError(_first(error)) from error


def _told(objective: Objective) -> dict[str, Any]:
    """The plain data that `_made` makes an objective of."""
    values = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}  # type: ignore[arg-type]
    return {"name": name_of(objective), **{k: _told(v) if isinstance(v, Objective) else v for k, v in values.items()}}


def _check_objective(tree: Any, where: str) -> None:
    """Raises ValueError for plain data that name no objective, or options it has not."""
    known = objectives()
    if not isinstance(tree, Mapping) or "name" not in tree:
        raise ValueError(f"{where} needs a name, one of: {', '.join(known)}")
    if tree["name"] not in known:
        raise ValueError(
            f"{where}.name: {tree['name']!r} is not known{_hint(str(tree['name']), known)}; there are: {', '.join(known)}"
        )
    check_keys(tree, ["name", *(f.name for f in dataclasses.fields(known[tree["name"]]))], where)  # type: ignore[arg-type]
    if "inner" in tree:
        _check_objective(tree["inner"], f"{where}.inner")


def stepped(chosen: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The objective with its number of steps, which a wrapper leaves to what it wraps."""
    inner = chosen.get("inner")
    return {"steps": steps, **chosen} if inner is None else {**chosen, "inner": stepped(inner, steps)}


def name_of(objective: Objective) -> str:
    """The registered name of an objective."""
    return next(name for name, kind in objectives().items() if type(objective) is kind)


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file with `a.b=c` overrides. Raises ValueError, in a sentence, for whatever is wrong with it."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no config at {file}; `fewstep list configs` names those that ship")
    try:
        tree = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds no settings; configs/ has complete examples")
    for text in overrides:
        override(tree, text)
    return parse(tree)


def override(tree: dict[str, Any], text: str) -> None:
    """Applies one `a.b=value` to a tree; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set wants KEY=VALUE, as in --set train.rounds=100, not {text!r}")
    *path, leaf = key.strip().split(".")
    for name in path:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ValueError(f"--set {text}: {name} holds a value, not further settings")
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text}: the value is not YAML; put it in quotes") from error


def parse(tree: Mapping[str, Any]) -> Config:
    """A config from plain data. Raises ValueError naming the first unknown, missing or wrong setting and a remedy."""
    check_keys(tree, Config.model_fields, "")
    for part, kind in (("teacher", TeacherConfig), ("student", StudentConfig), ("critic", WeightsConfig), ("data", DataConfig)):
        check_keys(tree.get(part, {}), kind.model_fields, part)
    check_keys(tree.get("train", {}), [f.name for f in dataclasses.fields(Settings)], "train")
    _check_objective(tree.get("objective"), "objective")
    try:
        config = Config.model_validate(dict(tree))
    except ValidationError as error:
        raise ValueError(_first(error)) from error
    if (config.data.prompts is None) == (config.data.images is None):
        raise ValueError("data needs exactly one of prompts and images, as in data: {prompts: zoo:sprites}")
    if config.data.pairs and config.data.images is not None:
        raise ValueError("data.pairs are drawn by the teacher for data.prompts; give those in place of data.images")
    needs, name = config.objective.needs, name_of(config.objective)
    if needs.inputs and config.student.weights != "full":
        raise ValueError(
            f"objective {name}, set like this, feeds the student's network the {' and the '.join(needs.inputs)}, "
            "for which it needs weights of its own: set student: {weights: full}"
        )
    if (needs.inputs or needs.average is not None) and config.phases > 1:
        raise ValueError(
            f"objective {name}, set like this, wants a student of one network, not of {config.phases} experts: "
            "leave student.phases away"
        )
    kinds = config.kinds()
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
    return config


def _first(error: ValidationError) -> str:
    """The first thing that pydantic objects to, as one sentence with its dotted place."""
    first = error.errors()[0]
    where = ".".join(str(x) for x in first["loc"])
    said = first["msg"].removeprefix("Value error, ")
    return f"{where}: {said}" if where else said


def check_keys(tree: Any, known: Any, where: str) -> None:
    """Raises ValueError for a key that is not known, with the nearest known one."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where or 'the config'} must hold settings, not {tree!r}")
    for key in tree:
        if key not in known:
            raise ValueError(
                f"{where + '.' if where else ''}{key}: unknown option{_hint(str(key), known)}; known: {', '.join(known)}"
            )


def _hint(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def differences(old: Config, new: Config, free: Sequence[str] = ()) -> list[str]:
    """Dotted names of settings in which two configs differ, but for the `free` ones."""
    a, b = (_flat(c.model_dump(mode="json")) for c in (old, new))
    return sorted(k for k in {*a, *b} if a.get(k) != b.get(k) and k not in free)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, value in tree.items() for k, v in _flat(value, f"{prefix}{name}.").items()}


ATTENTION = {"sdpa": "native", "xformers": "xformers", "flash": "flash"}
