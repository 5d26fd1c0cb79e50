"""Every objective's student is deployed with a step that goes where it was taught to go, and with no other."""

import pytest

from fewstep.config import parse
from fewstep.objectives import objectives
from fewstep.objectives.samplers import deployed_sampler
from fewstep.sampling import STEPS

# What each may take several steps by; a name that is in no row may take them by any.
SETTLED = {
    ("ddim",): {"progressive", "adversarial_distance", "guidance", "consistency", "meanflow", "rcgm", "twinflow", "shortcut"}
    | {"reflow", "regression", "annealed_reflow", "flow_guided"},
    ("renoise",): {"scm", "rcm", "ect", "ict"},
    (): {"boot"},
}
ALLOWED = {name: next((steps for steps, names in SETTLED.items() if name in names), tuple(STEPS)) for name in objectives()}
OFFERED = {"VP": ("renoise", "ddim"), "flow": ("ddim", "renoise"), "one sampler": ("ddim",)}

every = pytest.mark.parametrize("name", objectives())


def config(name, **options):
    """A config whose objective has these options; a wrapper's inner one has them."""
    kind = objectives()[name]
    told = {"name": name, **options}
    if "inner" in kind.__dataclass_fields__:
        inner = next(key for key, known in objectives().items() if known is type(kind().inner))
        told = {"name": name, "inner": {"name": inner, **options}}
    needs = kind().needs
    data = {"images" if needs.images else "prompts": "zoo:sprites"}
    data = {"prompts": "zoo:sprites", "pairs": 8} if needs.pairs else data
    return parse({"teacher": {"path": "zoo:sprites-sd"}, "student": {"weights": "full"}, "objective": told, "data": data})


@every
@pytest.mark.parametrize("sampler", STEPS)
def test_a_step_that_would_not_go_where_the_student_learned_is_refused(name, sampler):
    if sampler in ALLOWED[name]:
        assert config(name, steps=2, sampler=sampler).objective.sampler == sampler
    else:
        with pytest.raises(ValueError, match="set its sampler to|set its steps to 1") as refused:
            config(name, steps=2, sampler=sampler)
        assert "\n" not in str(refused.value)
    if name != "phased_dmd":  # of two phases, so of two steps at least
        assert config(name, steps=1, sampler=sampler).objective.steps == 1


@every
@pytest.mark.parametrize("family", OFFERED)
def test_the_step_that_nobody_names_is_the_familys_first_that_will_do(name, family):
    offered = OFFERED[family]
    wanted = [sampler for sampler in offered if sampler in ALLOWED[name]]
    if not ALLOWED[name]:
        with pytest.raises(ValueError, match="in one step, not in 2; set its steps to 1"):
            config(name, steps=2)
        assert deployed_sampler(name, config(name, steps=1).objective, offered) == offered[0]
        return
    objective = config(name, steps=2, sampler=None).objective
    if wanted:
        assert deployed_sampler(name, objective, offered) == wanted[0]
        return
    with pytest.raises(ValueError, match="by renoise, which no stock scheduler of this teacher's family computes"):
        deployed_sampler(name, objective, offered)
    assert deployed_sampler(name, config(name, steps=1).objective, offered) == offered[0]


@pytest.mark.parametrize(
    ("name", "options", "allowed"),
    [
        ("consistency", {"segments": 1}, ("renoise",)),
        ("consistency", {"segments": 2, "steps": 2}, ("ddim",)),
        ("consistency", {"segments": None}, ("ddim",)),
        ("consistency", {"segments": None, "steps": 1}, ("renoise",)),
        ("tcd", {"segments": 2}, ("ddim",)),
        ("tcd", {"end_input": True}, ("ddim",)),
        ("tcd", {}, None),
    ],
)
def test_segments_and_ends_that_are_told_settle_the_step(name, options, allowed):
    objective = objectives()[name](**{"steps": 4, **options})
    assert objective.samplers == allowed
    for wrapper in ("adversarial", "adversarial_distance"):
        assert objectives()[wrapper](inner=objective).samplers == allowed
