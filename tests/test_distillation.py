"""One call from Python: its arguments become a config, or a sentence says why not. Nothing is trained here."""

from pathlib import Path

import pytest

import fewstep
from fewstep import distillation
from fewstep.objectives import objectives
from fewstep.objectives.adversarial import Adversarial
from fewstep.objectives.dmd import DMD
from fewstep.objectives.progressive import Progressive


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """What `train` was asked for: (folder, resume)."""
    found = []

    def train(config, folder, *, resume):
        found.append((folder, resume))
        return config

    monkeypatch.setattr(distillation, "train", train)
    return found


def distilled(objective, **given):
    return fewstep.distill(**{"teacher": "zoo:sprites-sd", "data": "zoo:sprites", **given}, objective=objective)


def test_an_objective_of_images_takes_them():
    config = distilled("consistency", steps=2)
    assert (config.data.images, config.data.prompts, config.objective.steps) == ("zoo:sprites", None, 2)


def test_the_steps_are_the_objectives_own_where_none_are_asked():
    most = {"data": {"prompts": "zoo:sprites", "pairs": 8}, "student": {"weights": "full"}, "train": {"rounds": 1000}}
    for name, kind in objectives().items():
        assert distilled(name, **most).objective.steps == kind().steps


def test_a_wrapper_leaves_the_steps_to_what_it_wraps():
    assert distilled("adversarial").objective == Adversarial()
    assert distilled("adversarial", steps=1).objective.inner == DMD(steps=1)
    assert distilled("adversarial_distance", steps=2).objective.inner == Progressive(steps=2)
    inner = {"name": "dmd", "critic_turns": 2}
    assert distilled({"name": "adversarial", "inner": inner}, steps=1).objective.inner == DMD(steps=1, critic_turns=2)
    assert distilled({"name": "dmd", "steps": 2}, steps=1).objective.steps == 2  # the nearer word


def test_teacher_and_data_may_be_paths_or_whole_parts_of_a_config():
    for path in ("teachers/sd", Path("teachers/sd")):
        assert distilled("dmd", teacher=path).teacher.path == "teachers/sd"
        config = distilled("dmd", teacher={"path": path, "guidance": 2}, data={"prompts": path})
        assert (config.teacher.path, config.teacher.guidance, config.data.prompts) == ("teachers/sd", 2.0, "teachers/sd")


def test_a_call_goes_on_with_its_run_where_it_is_told_to(asked):
    distilled("dmd")
    distilled("dmd", out="runs/mine", resume=True)
    assert asked == [(Path("runs/distilled"), False), (Path("runs/mine"), True)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"objective": {"critic_turns": 2}}, "objective needs a name, as in objective"),
        ({"objective": None}, "objective needs a name"),
        ({"objective": ["dmd"]}, "objective needs a name"),
        ({"objective": "dmdd"}, "objective.name: 'dmdd' is not known; did you mean dmd?"),
        ({"objective": {"name": ["dmd"]}}, "objective.name: ['dmd'] is not known"),
        (
            {"objective": {"name": "adversarial", "inner": "dmd"}, "steps": 1},
            "objective.inner needs a name, as in objective.inner",
        ),
        ({"objective": {"name": "adversarial", "inner": None}, "steps": 1}, "objective.inner needs a name"),
        ({"data": None}, "data must be a file of prompts, a folder of images, or settings as in data={'prompts': 'words.txt'}"),
        ({"data": ["a star"]}, "data must be a file of prompts"),
        ({"teacher": None}, "teacher must hold settings, not None"),
        ({"student": "full"}, "student must hold settings, not 'full'"),
        ({"trian": {}}, "trian: unknown option; did you mean train?"),
    ],
)
def test_what_cannot_be_meant_is_a_sentence(asked, given, said):
    with pytest.raises(ValueError) as error:
        distilled(given.pop("objective", "dmd"), **given)
    assert str(error.value).startswith(said) and "\n" not in str(error.value) and not asked
