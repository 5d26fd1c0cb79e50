"""Which of a family's deployed steps a student takes, and which ones would draw something else than it learned."""

from __future__ import annotations

from collections.abc import Collection

from fewstep.objectives.base import Objective


def check_sampler(name: str, objective: Objective) -> None:
    """Raises ValueError for a deployed step that would not go where the student of objective `name` was taught to go."""
    allowed, steps = objective.samplers, objective.steps
    if steps == 1 or allowed is None or (allowed and objective.sampler in (None, *allowed)):
        return
    if not allowed:
        raise ValueError(f"a student of {name} draws in one step, not in {steps}; set its steps to 1")
    raise ValueError(
        f"a student of {name}, set like this, takes its {steps} steps by {' or '.join(allowed)}, and {objective.sampler} would "
        f"not go where it was taught to go; set its sampler to {allowed[0]}, or its steps to 1"
    )


def deployed_sampler(name: str, objective: Objective, offered: Collection[str]) -> str:
    """The step that the student of objective `name` is deployed with, of those that its family offers, the default one first.

    Raises ValueError where none of them would do."""
    check_sampler(name, objective)
    allowed = offered if objective.samplers is None else [sampler for sampler in offered if sampler in objective.samplers]
    if not allowed and objective.steps > 1:
        raise ValueError(
            f"a student of {name}, set like this, takes its {objective.steps} steps by {' or '.join(objective.samplers or ())}, "
            f"which no stock scheduler of this teacher's family computes (it has: {', '.join(offered)}); set its steps to 1, or "
            "take another objective"
        )
    return objective.sampler or next(iter(allowed or offered))
