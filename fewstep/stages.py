"""Runs of several stages: where each lies, what a resumed run may still change, and how a student starts from the one before.

RUN/config.yaml holds all stages; RUN/stage-1, RUN/stage-2, ... each a stage's checkpoints, metrics and grids. A run of one stage
has these in RUN itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from fewstep import checkpoint
from fewstep.config import Config, differences, load
from fewstep.experts import PhasedExperts, apart
from fewstep.folders import check_free
from fewstep.loraformat import fold, merge
from fewstep.networks import Lora, Role, set_weights
from fewstep.succession import tutor
from fewstep.trainer import Settings

# What may change when a run goes on: how long it is and how often it reports.
RESUMABLE = ("train.rounds", "train.log_every", "train.save_every", "train.preview_every", "train.keep")

# And where lies what it learns from and is taught by, if its checkpoint keeps under this key what that is (`identity`).
MOVABLE = {"data.prompts": "data", "data.images": "data", "teacher.path": "teacher"}

LOCK = ".lock"  # in a run's folder while a process trains in it; a file of that name that nobody holds means nothing
APART, SEEDS = 1_000_003, 2**32  # between the seeds of stages: none sees the noise of another; and how many seeds there are


@dataclass(frozen=True)
class Stage:
    """A fit of a run: its config, the folder it leaves its traces in, the stages it comes after; at: one of its checkpoints."""

    config: Config
    folder: Path
    before: tuple[Stage, ...] = ()
    at: Path | None = None

    @property
    def place(self) -> Path | None:
        """The checkpoint that it is looked at, the newest if none is named; None before the first."""
        return self.at or checkpoint.latest(self.folder / "checkpoints")

    def reached(self, place: Path) -> dict[str, int]:
        """How far a checkpoint of it is trained: the round, and after other stages which one it is."""
        return {"round": checkpoint.round_of(place), **({"stage": len(self.before) + 1} if self.before else {})}

    @property
    def finished(self) -> bool:
        """Whether the newest checkpoint is of the last round. Raises ValueError where it is damaged."""
        place = self.place
        return place is not None and checkpoint.inspect(place)["round"] >= self.config.train.rounds

    @property
    def taught(self) -> Path | None:
        """The newest checkpoint of this stage or of one before it: all have one teacher on their path."""
        return next((stage.place for stage in (self, *reversed(self.before)) if stage.place is not None), None)

    @property
    def settings(self) -> Settings:
        """Of its training; a stage's random draws are its own, those of the first the run's."""
        return replace(self.config.train, seed=(self.config.train.seed + len(self.before) * APART) % SEEDS)

    @property
    def tutor(self) -> Stage | None:
        """The stage whose student teaches this one; None where the teacher on the path does."""
        number = tutor(self.config, len(self.before) + 1)
        return None if number is None else self.before[number - 1]

    def begin(self, roles: Mapping[str, Role | PhasedExperts]) -> None:
        """Gives fresh roles what earlier stages left: the student the last one's averaged student, the tutor that of its own."""
        if self.before:
            self.before[-1].hand_on(roles["student"])
        if self.tutor is not None:
            self.tutor.hand_on(roles["tutor"])
            roles["tutor"].requires_grad_(False)

    def hand_on(self, heir: Role | PhasedExperts) -> None:
        """Puts this stage's averaged student into another's role."""
        assert self.place is not None, "stages are trained in order"
        parts = apart(checkpoint.load(self.place)[0]["ema"], self.config.phases)
        for k, role in enumerate(heir.experts if isinstance(heir, PhasedExperts) else [heir]):
            assert isinstance(role, Role)
            set_weights(role, _as_its_own(role, parts[k % len(parts)], self.config))


def _as_its_own(role: Role, weights: Mapping[str, Tensor], old: Config) -> Mapping[str, Tensor]:
    """The weights of an earlier student under the names of a role that computes the same: adapters are merged into full weights,
    inputs that the student did not have keep the embedders that start at zero effect."""
    if role.adapter is not None:
        return weights
    kind, own = old.student_kind(), role.weights()
    if isinstance(kind, Lora):
        merged = merge(role.net.state_dict(), fold(weights, kind.scale))
        return {key: merged[key] for key in own}
    return {**own, **weights}


def stages_of(config: Config, folder: Path) -> list[Stage]:
    """The stages of a run in their order."""
    if not config.stages:
        return [Stage(config, folder)]
    found: list[Stage] = []
    for i, part in enumerate(config.stages, 1):
        found.append(Stage(part, folder / f"stage-{i}", tuple(found)))
    return found


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, or a stage or a checkpoint of one."""
    return _found(folder) is not None


def find(folder: Path) -> tuple[Config, Stage]:
    """The config of a run and its last stage; of a stage's folder, or of a checkpoint's, its own and itself.

    Raises ValueError for another folder."""
    found = _found(folder)
    if found is None:
        raise ValueError(f"{folder} is not a run folder: it has no config.yaml")
    return found


def traces(folder: Path) -> dict[str, Path]:
    """Where metrics and grids of a run lie, by the name to show: one folder a stage, in order; any other folder is its own."""
    found, name = _found(folder), _named(folder).name
    if found is None or not found[0].stages:
        return {name: folder}
    return {f"{name}/{stage.folder.name}": stage.folder for stage in stages_of(found[0], folder)}


def _found(folder: Path) -> tuple[Config, Stage] | None:
    if (folder / "config.yaml").exists():
        config = load(folder / "config.yaml")
        return config, stages_of(config, folder)[-1]
    stage = _named(folder)
    if stage.parent.name == "checkpoints" and stage.is_dir() and stage.name.startswith("step-"):
        owner = _found(stage.parent.parent)
        return owner and (owner[0], replace(owner[1], at=stage))
    if stage.name.startswith("stage-") and (stage.parent / "config.yaml").exists():
        parts = stages_of(load(stage.parent / "config.yaml"), stage.parent)
        return next(((part.config, part) for part in parts if part.folder == stage), None)
    return None


def _named(folder: Path) -> Path:
    """The folder by its absolute path: "." and ".." say neither what they are called nor what they lie in."""
    return Path(os.path.abspath(folder))


def store(config: Config, folder: Path) -> None:
    """Writes a run's config.yaml, which holds wherever it is read. A kill leaves a folder that is empty, or a run."""
    folder.mkdir(parents=True, exist_ok=True)
    own = _named(folder)
    scratch = own.with_name(f".{own.name}.config.yaml")  # beside it
    scratch.write_text(absolute(config).dump())
    os.replace(scratch, folder / "config.yaml")


def absolute(config: Config) -> Config:
    """The config with its local paths, of teachers and of data, as absolute ones; zoo:NAME and hub ids stay."""

    def place(path: str | None) -> str | None:
        return path if path is None or path.startswith("zoo:") else os.path.abspath(os.path.expanduser(path))

    data = config.data.model_copy(update={"prompts": place(config.data.prompts), "images": place(config.data.images)})
    path = config.teacher.path
    teacher = config.teacher.model_copy(update={"path": place(path) if Path(path).exists() else path})  # else a hub id
    return config.model_copy(
        update={"teacher": teacher, "data": data, "stages": tuple(absolute(stage) for stage in config.stages)}
    )


def check_folder(config: Config, folder: Path, resume: bool) -> None:
    """Raises ValueError where a run cannot begin, or not go on, in a folder, before anything is loaded or written.

    A run that has no checkpoint yet has not begun: another may take its place."""
    stored = folder / "config.yaml"
    check_free(folder)
    if folder.exists() and any(file.name != LOCK for file in folder.iterdir()) and not stored.exists():
        raise ValueError(f"{folder} holds other files and no run; name an empty folder with --out")
    if resume and not stored.exists():
        raise ValueError(f"there is no run at {folder} to resume; leave --resume away to start one")
    if not stored.exists() or not any(checkpoint.latest(part / "checkpoints") for part in (folder, *folder.glob("stage-*"))):
        return
    if not resume:
        raise ValueError(f"{folder} already holds a run; add --resume to go on with it, or name another folder with --out")
    _check_same(load(stored), config, folder)


@contextmanager
def claimed(config: Config, folder: Path, resume: bool) -> Iterator[None]:
    """Keeps a run's folder from other processes while this one trains in it; of several of one run, the first claims it.

    The claim ends with the process, however that ends, and leaves no folder for a run that did not begin. Raises ValueError
    where another process trains there, and as `check_folder` does."""
    check_folder(config, folder, resume)
    if int(os.environ.get("RANK", "0")):
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire(blocking=False)
    except Timeout:
        remedy = "wait for it, stop it, or name another folder with --out"
        raise ValueError(f"another process is training in {folder}; {remedy}") from None
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()
        lock.release()


def _check_same(old: Config, new: Config, folder: Path) -> None:
    """Raises ValueError where a run that goes on would not be the one that was begun, or its checkpoints are damaged.

    A stage that has not begun may become another one; one that the next has begun from keeps its rounds."""
    begun = [stage for stage in stages_of(absolute(old), folder) if stage.place is not None]
    coming = stages_of(absolute(new), folder)
    for i, stage in enumerate(begun):
        if i >= len(coming) or coming[i].folder != stage.folder:
            raise ValueError(f"the run at {folder} has other stages; resume with its own config.yaml, or name another --out")
        assert stage.place is not None
        state = checkpoint.inspect(stage.place)
        moved = (key for key, kept in MOVABLE.items() if kept in state and _given(stage.config, coming[i].config, key))
        free = (*(RESUMABLE if i == len(begun) - 1 else RESUMABLE[1:]), *moved)
        which = f"stages.{i + 1}." if new.stages else ""
        if changed := differences(stage.config, coming[i].config, free):
            raise ValueError(
                f"the run at {folder} was made with another {which}{changed[0]}; "
                "resume with its own config.yaml, or name another --out"
            )
        done, rounds = state["round"], coming[i].config.train.rounds
        if done > rounds:
            said = f"the run at {folder} has trained {done} rounds already, more than {which}train.rounds={rounds}"
            raise ValueError(f"{said}; set that to {done} or more, or name another --out")


def _given(old: Config, new: Config, key: str) -> bool:
    """Whether both configs name a place there."""
    part, name = key.split(".")
    return None not in (getattr(getattr(old, part), name), getattr(getattr(new, part), name))
