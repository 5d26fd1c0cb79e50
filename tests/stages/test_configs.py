"""Configs of several stages: what a stage says of its own, and what cannot follow what."""

import pytest
import yaml

from fewstep.config import load, parse
from fewstep.objectives.dmd import DMD
from fewstep.objectives.tcd import TCD
from fewstep.plain import override

TOLD = {"end_input": True, "sampler": "ddim"}


def tree(*own, **parts):
    """Plain data of a run of stages."""
    return {
        "teacher": {"path": "zoo:sprites-sd", "guidance": 3.0},
        "objective": {"name": "tcd", "steps": 4, "solver_steps": 8},
        "data": {"images": "zoo:sprites"},
        "stages": list(own),
        **parts,
    }


def refusal(*own, **parts):
    with pytest.raises(ValueError) as error:
        parse(tree(*own, **parts))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)


# What a config says


def test_a_stage_says_only_what_is_its_own():
    config = parse(
        tree(
            {"objective": {"segments": 4}},
            {"objective": {"segments": 2}, "train": {"rounds": 7}, "teacher": "previous"},
            {"objective": {"name": "dmd", "steps": 1}, "data": {"prompts": "zoo:sprites"}},
            train={"lr": 0.5},
        )
    )
    first, second, third = config.stages
    assert first.objective == TCD(steps=4, solver_steps=8, segments=4)
    assert second.objective == TCD(steps=4, solver_steps=8, segments=2)
    assert third.objective == DMD(steps=1) and third.data.prompts and third.data.images is None
    assert [s.train.rounds for s in config.stages] == [300, 7, 300] and {s.train.lr for s in config.stages} == {0.5}
    assert [s.teacher.net for s in config.stages] == ["original", "previous", "original"]
    assert {s.teacher.guidance for s in config.stages} == {3.0}
    assert config.judged().model_copy(update={"stages": ()}) == third


def test_what_an_objective_holds_is_merged_too():
    inner = {"name": "tcd", "steps": 2, "solver_steps": 8}
    wrapped = {"name": "adversarial", "heads": "ladd", "weight": 0.5, "inner": inner}
    config = parse(tree({}, {"objective": {"inner": {"segments": 2}, "weight": 2.0}}, objective=wrapped))
    assert [s.objective.inner.segments for s in config.stages] == [1, 2]
    assert [s.objective.weight for s in config.stages] == [0.5, 2.0]


def test_a_run_of_stages_comes_back_as_it_was_written(tmp_path):
    config = parse(
        tree(
            {"objective": {"name": "progressive", "steps": 4}},
            {"teacher": "previous", "objective": {"name": "progressive", "steps": 2}, "train": {"rounds": 5}},
        )
    )
    file = tmp_path / "config.yaml"
    file.write_text(config.dump())
    assert load(file) == config and load(file).dump() == config.dump()
    assert [set(stage) for stage in yaml.safe_load(config.dump())["stages"]] == [{*config.model_dump()} - {"stages"}] * 2


def test_set_reaches_every_stage_or_the_one_that_is_named(tmp_path):
    file = tmp_path / "config.yaml"
    for text in (yaml.safe_dump(tree({"train": {"rounds": 5}}, {})), parse(tree({"train": {"rounds": 5}}, {})).dump()):
        file.write_text(text)
        assert [s.train.rounds for s in load(file, ["train.rounds=9"]).stages] == [9, 9]
        assert [s.train.rounds for s in load(file, ["stages.2.train.rounds=9"]).stages] == [5, 9]
        assert {s.student.weights for s in load(file, ["student.weights=full"]).stages} == {"full"}
    for text in ("stages.3.train.rounds=9", "stages.0.train.rounds=9", "stages.x.train=9", "stages.1=9", "stages=9"):
        with pytest.raises(ValueError, match="there is no such stage; stages.1.train.rounds=100 is for the first of 2"):
            override(tree({}, {}), text)


@pytest.mark.parametrize(
    ("own", "parts", "said"),
    [
        ([{"objectve": {}}], {}, "stages.1.objectve: unknown option; did you mean objective?"),
        ([{"stages": []}], {}, "stages.1.stages: unknown option"),
        ([{}, {"objective": {"segmentz": 2}}], {}, "stages.2: objective.segmentz: unknown option; did you mean segments?"),
        ([3], {}, "stages.1 must hold settings, not 3"),
        ([{}], {"stages": "two"}, "stages must be a list of settings"),
        (
            [{"teacher": "previous"}],
            {},
            "stages.1: teacher: no stage comes before this one that previous could name; leave it away",
        ),
        ([], {"teacher": {"path": "x", "net": "previous"}}, "teacher: no stage comes before this one that previous"),
        ([{}, {"teacher": "stage-2"}], {}, "stages.2: teacher: no stage comes before this one that stage-2"),
        ([{}, {"teacher": "stage-0"}], {}, "stages.2: teacher: no stage comes before this one that stage-0"),
        (
            [{}, {"teacher": "last"}],
            {},
            "stages.2: teacher.net: who teaches is original, previous or an earlier stage by its name",
        ),
        ([{}, {"teacher": {"path": "x"}}], {}, "stages.2: teacher: the stages of a run share one path"),
        ([{}, {"student": {"rank": 2}}], {}, "stages.2: student: a LoRA goes on from a LoRA of the same rank and alpha"),
        ([{"student": {"weights": "full"}}, {}], {}, "stages.2: student: a LoRA goes on from a LoRA of the same rank"),
        (
            [{"objective": {"guidance": [1, 3]}}, {"objective": {"guidance": None}}],
            {"student": {"weights": "full"}},
            "stages.2: objective: the student before takes the guidance_scale, which this objective",
        ),
        ([{"student": {"phases": 2}}, {}], {}, "stages.2: student.phases: 1 cannot go on from the 2 of a stage before"),
        ([{}, {"student": {"phases": 2}, "teacher": "previous"}], {}, "stages.2: teacher: only a student of one network"),
        (
            [{"objective": TOLD}, {"objective": TOLD, "teacher": "previous"}],
            {"student": {"weights": "full"}},
            "stages.2: teacher: only a student of one network that takes what this one takes, and no end",
        ),
        ([{}, {"data": {"prompts": "zoo:sprites"}}], {}, "stages.2: objective tcd needs images"),
    ],
)
def test_what_cannot_follow_is_refused_at_its_stage(own, parts, said):
    assert refusal(*own, **parts).startswith(said)
