"""Runs of several stages: each starts where the last one ended, and going on is as if nothing had happened."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from staged import begun, trained

from fewstep import api, checkpoint, stages
from fewstep.config import differences, parse
from fewstep.denoiser import Guided
from fewstep.networks import Full, Lora, set_weights
from fewstep.objectives.progressive import Progressive
from fewstep.plan import plan
from fewstep.verify import verify


@pytest.fixture(scope="module")
def setup(teacher, images):
    """(*stages, **train) -> Config of two rounds a stage."""

    def make(*own, weights="lora", **train):
        plain = {
            "teacher": {"path": teacher, "guidance": 2.0},
            "student": {"weights": weights, "rank": 2},
            "critic": {"rank": 2},
            "objective": {"name": "tcd", "steps": 2, "solver_steps": 4},
            "data": {"images": images},
            "train": {"rounds": 2, "batch": 2, "lr": 1e-3, "save_every": 1, "log_every": 1, "device": "cpu", **train},
        }
        return parse({**plain, "stages": list(own)} if own else plain)

    return make


HALVED = {"teacher": "previous", "objective": {"name": "progressive", "steps": 1}}
TWO = [{"objective": {"segments": 2}}, HALVED]
MATCHED = {"objective": {"name": "dmd", "steps": 1, "critic_turns": 1}}


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}


def weights_of(stage):
    """All that the newest checkpoint of a folder holds, byte for byte."""
    return contents(checkpoint.latest(stage / "checkpoints"))


def drop(folder, *rounds):
    """Leaves a stage as it was before some of its checkpoints; before all of them nothing is left of it."""
    for done in rounds:
        shutil.rmtree(folder / f"checkpoints/step-{done:07d}")
    if checkpoint.latest(folder / "checkpoints") is None:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def whole(setup, tmp_path_factory):
    """A finished run of TWO."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    api.train(setup(*TWO), folder)
    return folder


@pytest.mark.parametrize("lost", [{2: [2]}, {2: [1, 2]}, {2: [1, 2], 1: [2]}], ids=["inside 2", "between", "inside 1"])
def test_a_run_of_two_stages_goes_on_to_the_bit(setup, whole, tmp_path, lost):
    parts = shutil.copytree(whole, tmp_path / "parts")
    for stage, rounds in lost.items():
        drop(parts / f"stage-{stage}", *rounds)
    api.train(setup(*TWO), parts, resume=True)
    assert {f.name for f in parts.iterdir()} == {"config.yaml", "stage-1", "stage-2"}
    assert all(weights_of(parts / f"stage-{i}") == weights_of(whole / f"stage-{i}") for i in (1, 2))


def test_a_stage_with_a_contest_goes_on_to_the_bit(setup, tmp_path):
    contest = {"teacher": "previous", "objective": {"name": "adversarial_distance", "inner": {"name": "progressive", "steps": 1}}}
    config, run = setup({"train": {"rounds": 1}}, contest), tmp_path / "run"
    api.train(config, run)
    once = weights_of(run / "stage-2")
    drop(run / "stage-2", 2)
    api.train(config, run, resume=True)
    assert weights_of(run / "stage-2") == once and once.keys() >= {"optimizer-critic.safetensors", "heads.safetensors"}


def test_a_student_starts_as_the_averaged_one_of_the_stage_before_and_is_taught_by_it(whole):
    run = api.Run(whole)
    config = run.config
    first, second = stages.stages_of(config, run.folder)
    left = checkpoint.load(first.place)[0]
    assert any(not torch.equal(v, left["student"][k]) for k, v in left["ema"].items())
    study = api.open_study(second.config)
    second.begin(study.roles)
    for name in ("student", "tutor"):
        own = study.roles[name].weights()
        assert own.keys() == left["ema"].keys() and all(torch.equal(v, left["ema"][k]) for k, v in own.items())
    assert [p.requires_grad for p in study.roles["tutor"].parameters()] == [False] * len(own)
    nets = study.nets(study.roles)
    x, t = torch.randn(2, *study.teacher.latent_shape), torch.tensor([0.3, 1.0], dtype=torch.float64)
    cond = study.teacher.encode(["a", "b"])
    assert isinstance(nets.teacher, Guided) and nets.teacher.scale == 1  # the student was guided when it was taught
    with torch.no_grad():
        assert torch.equal(nets.teacher(x, t, cond).x0, nets.student(x, t, cond).x0)
        plain = api.open_study(config.judged())
        assert not torch.equal(plain.nets(plain.roles).teacher(x, t, cond).x0, nets.teacher(x, t, cond).x0)
    assert checkpoint.load(second.place)[1]["grid"] == [1.0] and run.study.roles.keys() == {"teacher", "student"}


def test_the_first_stage_is_the_plain_run_and_the_second_sees_other_noise(setup, whole, tmp_path):
    plain = parse({**setup(*TWO).stages[0].model_dump(mode="json"), "stages": []})
    api.train(plain, tmp_path / "plain")
    assert weights_of(tmp_path / "plain") == weights_of(whole / "stage-1")
    first, second, third = stages.stages_of(setup({}, {}, {}), tmp_path)
    assert first.settings == plain.train and len({s.settings.seed for s in (first, second, third)}) == 3


def test_a_lora_goes_on_as_full_weights_that_compute_the_same(setup, tmp_path):
    config = setup({}, {"student": {"weights": "full"}})
    assert [s.student_kind() for s in config.stages] == [Lora(2), Full()]
    left, study = begun(config, tmp_path)
    old = api.open_study(config.stages[0])
    set_weights(old.roles["student"], left)
    x, t = torch.randn(2, *study.teacher.latent_shape), torch.tensor([0.3, 1.0], dtype=torch.float64)
    cond = study.teacher.encode(["a", "b"])
    with torch.no_grad():
        was, now = (s.player(s.roles["student"])(x, t, cond).x0 for s in (old, study))
        base = study.player(study.roles["teacher"])(x, t, cond).x0
    torch.testing.assert_close(now, was, rtol=1e-4, atol=1e-4)
    assert (now - base).abs().max() > 1e-2


def test_a_stage_may_be_taught_by_an_earlier_one_than_the_last(setup, tmp_path):
    """Lightning's two contests of a halving: both against the student of the halving before."""
    parts = stages.stages_of(setup({}, {}, {"teacher": "stage-1"}), tmp_path)
    first, last = (trained(stage) for stage in parts[:2])
    study = api.open_study(parts[2].config)
    parts[2].begin(study.roles)
    for name, left in (("student", last), ("tutor", first)):
        assert all(torch.equal(v, left[k]) for k, v in study.roles[name].weights().items())


def test_inputs_that_a_stage_adds_start_without_effect(setup, tmp_path):
    left, study = begun(setup({}, {"objective": {"guidance": [1.0, 3.0]}}, weights="full"), tmp_path)
    own = study.roles["student"].weights()
    assert all(torch.equal(own[k], v) for k, v in left.items())
    assert not own["time_embedding.cond_proj.weight"].any() and own.keys() - left.keys() == {"time_embedding.cond_proj.weight"}


def test_experts_all_start_as_the_one_student_before(setup, tmp_path):
    left, study = begun(setup({}, {"student": {"phases": 2}}), tmp_path)
    own = study.roles["student"].weights()
    assert len(own) == 2 * len(left) and all(torch.equal(v, left[k.partition(".")[2]]) for k, v in own.items())


def test_what_has_begun_is_not_changed_and_what_has_not_may_be(setup, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")

    def refused(said, *own, **train):
        before = contents(run)
        with pytest.raises(ValueError, match=said):
            api.train(setup(*own, **train), run, resume=True)
        assert contents(run) == before

    longer = {**TWO[0], "train": {"rounds": 3}}
    refused("was made with another stages.1.train.rounds; resume with its own", longer, HALVED)
    refused(
        "was made with another stages.2.objective.factor", TWO[0], {**HALVED, "objective": {**HALVED["objective"], "factor": 4}}
    )
    refused("has other stages; resume with its own config.yaml", TWO[0])
    refused("has other stages; resume with its own config.yaml")
    with pytest.raises(ValueError, match="already holds a run"):
        api.train(setup(*TWO), run)
    drop(run / "stage-2", 1, 2)
    api.train(setup(longer, MATCHED), run, resume=True)
    assert checkpoint.latest(run / "stage-1/checkpoints").name == "step-0000003"
    assert checkpoint.inspect(api.Run(run).place)["roles"] == ["student", "critic"]
    file = run / "stage-1/checkpoints/step-0000003/ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused("step-0000003 is damaged", longer, MATCHED)


def test_a_step_count_that_no_pipeline_has_is_refused_before_the_first_stage(setup, tmp_path):
    with pytest.raises(ValueError, match="3 does not divide this teacher's"):
        api.train(setup({}, {"objective": {"name": "progressive", "steps": 3}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_run_is_its_last_stage_and_a_stage_is_a_run_of_its_own(setup, whole, tmp_path):
    config, run = setup(*TWO), api.Run(whole)
    assert run.config == config and isinstance(run.config.objective, Progressive)
    assert run.place == checkpoint.latest(whole / "stage-2/checkpoints")
    out = run.export(tmp_path / "out")
    report = verify(out)
    assert report.ok, report.checks
    facts = json.loads((out / "fewstep.json").read_text())
    assert facts["steps"] == 1 and [s["objective"]["name"] for s in facts["record"]["config"]["stages"]] == ["tcd", "progressive"]
    first = api.Run(whole / "stage-1")
    assert first.config == config.stages[0] and first.place == checkpoint.latest(whole / "stage-1/checkpoints")
    assert first.sample(["a star"]).shape == run.sample(["a star"]).shape == (1, 64, 64, 3)
    assert stages.is_run(whole / "stage-2") and not stages.is_run(whole / "stage-3")
    assert list(stages.traces(run.folder)) == ["run/stage-1", "run/stage-2"]
    assert list(stages.traces(run.folder / "stage-1")) == ["stage-1"]
    with pytest.raises(ValueError, match="is not a run folder"):
        api.Run(whole / "stage-3")


def test_a_plan_names_every_stage(setup):
    config = setup(*TWO, weights="full")
    found = plan(config)
    each = [plan(stage) for stage in config.stages]
    assert found["stages"].keys() == {"stage-1", "stage-2"} and found["grid (network times)"] == each[1]["grid (network times)"]
    assert found["trained parameters"].keys() == {"student"}
    assert found["settings"] == config.model_dump(mode="json") and differences(parse(found["settings"]), config) == []
    json.dumps(found)
