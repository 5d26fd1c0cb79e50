"""Every objective on real networks: two rounds on tiny pipelines of three kinds of target, each once exported and proved."""

import gc
from typing import Any

import pytest
from test_matrix import matrix

from fewstep.objectives import objectives
from fewstep.plain import made

# Epsilon, v and flow, and the weights of roles there. Adapters on a base they share are what checkpointing could go wrong with.
FAMILIES = {"sd": "full", "sd21": "lora", "zimage": "lora"}
CHECKPOINTED = "zimage"

# What the registry holds is run as it is but for these, which keep it cheap or give it something to learn in two rounds.
OPTIONS: dict[str, dict[str, Any]] = {
    "annealed_reflow": {"anneal": 1},
    "consistency": {"solver_steps": 16},  # where one step is a segment, a teacher without guidance is at rest
    "ect": {"stage_rounds": 1},
    "guidance": {"steps": 4},
    "ict": {"rounds": 2},
    "phased_dmd": {"phase_rounds": 1},
    "rcm": {"rollout_steps": 2},
    "scm": {"warmup": 2},
    "tcd": {"solver_steps": 16},
}
# Other methods under the same names.
VARIANTS: dict[str, dict[str, Any]] = {
    "lcm, full": {"name": "consistency", "steps": 2, "solver_steps": 16, "guidance": [1.0, 5.0], "average": 0.95},
    "lcm": {"name": "consistency", "steps": 2, "solver_steps": 16, "segments": 1, "sampler": "renoise"},
    "sana-sprint": {
        "name": "adversarial", "heads": "ladd", "loss": "hinge",
        "inner": {"name": "scm", "steps": 2, "warmup": 2, "noise_share": 0.5, "guidance": [1.0, 5.0]},
    },
    "tcd, told its end": {
        "name": "tcd", "steps": 2, "solver_steps": 16, "end_input": True, "order": 2, "sampler": "ddim",
    },
}  # fmt: skip


def trees() -> dict[str, dict[str, Any]]:
    """An objective of a config for each name in the registry, of two steps where it can have some, and for each variant."""
    found = {}
    for name, kind in objectives().items():
        fields = kind.__dataclass_fields__
        tree: dict[str, Any] = {"name": name, **{k: 1 for k in ("critic_turns",) if k in fields}}
        if "inner" in fields:
            inner = "consistency" if name == "adversarial" else "progressive"
            tree["inner"] = {"name": inner, "steps": 2, **OPTIONS.get(inner, {})}
        elif fields["steps"].default > 1:
            tree["steps"] = 2
        found[name] = tree | OPTIONS.get(name, {})
    return found | VARIANTS


TREES = trees()
CELLS = [(name, family) for name in TREES for family in FAMILIES]
PROVED = {(name, [*FAMILIES][i % len(FAMILIES)]) for i, name in enumerate(TREES)}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    made = {family: matrix.saved(family, root) for family in FAMILIES}
    gc.collect()
    gc.freeze()  # a run ends with collections, which would walk everything that was ever imported: half of its time here
    yield made
    gc.unfreeze()


@pytest.mark.parametrize("name, family", CELLS)
def test_it_trains_and_its_export_is_proved(name, family, teachers, tmp_path):
    """Updates are finite and move their movers alone (`matrix.learn`)."""
    tree = TREES[name]
    weights = "full" if made(tree).needs.inputs else FAMILIES[family]  # what a network takes besides, an adapter cannot
    config = matrix.config_of(family, tree, weights, teachers[family], tmp_path, checkpointing=family == CHECKPOINTED)
    run = matrix.learn(config, tmp_path / "run")
    if (name, family) not in PROVED:
        return
    found = set(matrix.proved(run, tmp_path))
    alone = run.config.objective.samplers == () or ("end_time" in made(tree).needs.inputs and run.config.objective.steps == 1)
    counts = (1,) if alone else (1, 2, 4)
    assert found >= {f"{what} at {n}" for what in ("times", "pixels") for n in counts} | {"same seed, same picture"}
    assert {what for what in found if what.startswith("runs in")} == {f"runs in {n}" for n in counts}
