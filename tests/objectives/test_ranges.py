"""A setting that no turn could use is refused where the config is read, and not in the first student turn."""

from dataclasses import fields, replace

import pytest
from toys import ring

from fewstep.api import open_study
from fewstep.config import parse
from fewstep.objectives import objectives
from fewstep.objectives.ranges import check_fed
from fewstep.stream import stream

GUIDED = ("kappa1", "kappa2", "kappa3")  # they ask for a guided teacher, which this world has not


@pytest.mark.parametrize("name", objectives())
def test_what_is_accepted_can_be_played(name):
    kind = objectives()[name]
    first = kind(inner=replace(kind().inner, steps=2)) if "inner" in kind.__dataclass_fields__ else kind(steps=2)
    numbers = {f.name: getattr(first, f.name) for f in fields(first) if f.name not in ("inner", "steps", *GUIDED)}
    for setting, usual in numbers.items():
        for value in (-1, 0, 2) if type(usual) in (int, float) else ():
            try:
                objective = replace(first, **{setting: type(usual)(value)})
            except ValueError:
                continue
            world = ring(objective)
            for turn in [turn for step in (0, 3) for turn in objective.round(step)]:
                loss = turn.loss(world.nets, world.batch(2), stream(0, 0, 0, 0)).total
                assert loss.isfinite().all(), setting


def test_a_student_draws_at_a_scale_that_it_is_trained_at():
    check_fed(None, 9.0, embedded=True)
    check_fed(None, 9.0, embedded=False, mixes=True)
    check_fed((1.0, 6.0), 6.0, embedded=False)
    with pytest.raises(ValueError, match="would draw at this scale, 7.5, but objective.guidance has it trained at 1 to 6 only"):
        check_fed((1.0, 6.0), 7.5, embedded=False)
    with pytest.raises(ValueError, match="this teacher is fed its scale already, and would be guided twice; leave it away"):
        check_fed((1.0, 6.0), 3.0, embedded=True)
    with pytest.raises(ValueError, match="kappas mix two predictions, but this teacher is fed its scale; leave them away"):
        check_fed(None, 9.0, embedded=True, mixes=True)
    objective = {"name": "consistency", "guidance": [4.0, 6.0]}
    tree = {"teacher": {"path": "zoo:sprites-sd", "guidance": 3.0}, "student": {"weights": "full"}, "objective": objective}
    with pytest.raises(ValueError, match="would draw at this scale, 3, but"):
        open_study(parse({**tree, "data": {"images": "zoo:sprites"}}))


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ({"name": "scm", "std": 0}, "the spread of ln.* must be positive, not 0"),
        ({"name": "scm", "floor": 0}, "floor must be positive, not 0"),
        ({"name": "rcm", "score_std": -1}, "the spread of ln.* must be positive, not -1"),
        ({"name": "rcm", "critic_turns": 0}, "critic_turns must be at least 1, not 0"),
        ({"name": "meanflow", "std": 0}, "the spread of ln.* must be positive, not 0"),
        ({"name": "rcgm", "average": 1.5}, "average is a share of the average's weights in .0, 1., not 1.5"),
        ({"name": "reflow", "slope": 0}, "slope of U-shaped times must be positive"),
        ({"name": "boot", "boundary": -0.5}, "boundary must be at least 0, not -0.5"),
        ({"name": "guidance", "low": 1.0}, "a time range needs 0 <= low < high <= 1"),
        ({"name": "ect", "stage_rounds": 0}, "stage_rounds must be at least 1, not 0"),
        ({"name": "ect", "q": 1.0}, "pairs come closer up to a ratio below 1"),
        ({"name": "ict", "first": 0}, "first must be at least 1, not 0"),
        ({"name": "ict", "first": 10, "last": 5}, "levels rise from low to high and their number from first to last"),
        ({"name": "consistency", "solver_steps": 0}, "solver_steps must be at least 1, not 0"),
        ({"name": "phased_dmd", "critic_low": 1.0}, "a time range needs 0 <= low < high <= 1"),
        ({"name": "dmd", "floor": 0}, "floor must be positive, not 0"),
        ({"name": "phased_dmd", "floor": -1}, "floor must be positive, not -1"),
        ({"name": "phased_dmd", "most": 0}, "most must be positive, not 0"),
        ({"name": "sid", "dropout": 1}, "dropout is a share of prompts in .0, 1., not 1"),
        ({"name": "decoupled", "matching": -1}, "matching must be at least 0, not -1"),
        ({"name": "f_distill", "judge_weight": -1}, "judge_weight must be at least 0, not -1"),
        ({"name": "adversarial", "weight": -1}, "weight must be at least 0, not -1"),
        ({"name": "adversarial", "inner": {"name": "dmd", "steps": 0}}, ".inner.steps must be at least 1, not 0"),
        ({"name": "boot", "steps": 0}, ".steps must be at least 1, not 0"),
        ({"name": "boot", "steps": 2}, "a student of boot draws in one step, not in 2; set its steps to 1"),
        ({"name": "adversarial", "inner": {"name": "boot", "steps": 2}}, "draws in one step, not in 2"),
        ({"name": "tcd", "huber": float("nan")}, "huber must be positive, not nan"),
        ({"name": "consistency", "average": 1.0}, "average is a share of the average's weights in .0, 1., not 1.0"),
    ],
)
def test_what_no_turn_could_use_is_refused_where_the_config_is_read(objective, says):
    tree = {"teacher": {"path": "zoo:sprites-sd"}, "objective": objective, "data": {"images": "zoo:sprites"}}
    with pytest.raises(ValueError, match=f"objective.*{says}"):
        parse(tree)
