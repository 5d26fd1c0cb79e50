"""What may come after what: a stage's student starts from that of the stage before, and one of an earlier stage may teach it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewstep.embedders import END
from fewstep.networks import Full, Lora

Config = Any  # config.Config, whose module imports this one


def tutor(config: Config, number: int) -> int | None:
    """Which stage's student teaches stage `number` of a run, from 1; None where the teacher on the path does."""
    if config.teacher.net == "original":
        return None
    return number - 1 if config.teacher.net == "previous" else int(config.teacher.net.removeprefix("stage-"))


def check_start(config: Config, before: Sequence[Config]) -> None:
    """Raises ValueError where a student cannot start from that of the last stage, or not be taught by that of an earlier one."""
    teaching, kind = tutor(config, len(before) + 1), config.student_kind()
    if teaching is not None and not 1 <= teaching <= len(before):
        raise ValueError(f"teacher: no stage comes before this one that {config.teacher.net} could name; leave it away")
    if before and (config.teacher.path, config.teacher.size) != (before[-1].teacher.path, before[-1].teacher.size):
        raise ValueError("teacher: the stages of a run share one path and one size; write them once, above the stages")
    for old in (*before[-1:], *([before[teaching - 1]] if teaching else [])):
        if isinstance(kind, Lora) and kind != old.student_kind():
            raise ValueError(
                "student: a LoRA goes on from a LoRA of the same rank and alpha; "
                "write the same student in the stages before, or student: {weights: full} in this one"
            )
        if config.student.network != old.student.network:
            raise ValueError("student.network: the stages of a run share one network; write it once, above the stages")
        if lost := sorted({*_inputs(old)} - {*_inputs(config)}):
            raise ValueError(f"objective: the student before takes the {lost[0]}, which this objective does not tell it")
        if old.phases not in (1, config.phases):
            raise ValueError(
                f"student.phases: {config.phases} cannot go on from the {old.phases} of a stage before; set the same"
            )
    if teaching and before[teaching - 1].student.conditioning_timestep is not None:
        raise ValueError(
            f"teacher: a student with a conditioning_timestep knows its own walk alone; leave {config.teacher.net} away"
        )
    if teaching and before[teaching - 1].objective.local:
        steps, asks = before[teaching - 1].objective.steps, config.objective.asks
        if asks not in (0, steps):
            where = f"at those of {asks} steps" if asks else "anywhere"
            raise ValueError(
                f"teacher: the student of {config.teacher.net} knows the times of its own {steps} steps alone, and this "
                f"objective would ask it {where}; leave it away, or halve its steps by progressive"
            )
    if teaching and (config.phases > 1 or _inputs(before[teaching - 1]) != _inputs(config) or END in _inputs(config)):
        raise ValueError(
            "teacher: only a student of one network that takes what this one takes, and no end of its jump, can teach it; "
            f"leave {config.teacher.net} away"
        )


def _inputs(config: Config) -> tuple[str, ...]:
    kind = config.student_kind()
    return kind.inputs if isinstance(kind, Full) else ()
