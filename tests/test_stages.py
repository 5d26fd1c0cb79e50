"""Runs of several stages: each starts where the last one ended, and going on is as if nothing had happened."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import save, tiny_sd_pipeline

from fewstep import api, checkpoint, stages
from fewstep.config import differences, load, parse
from fewstep.data import open_source, pairs
from fewstep.denoiser import Guided
from fewstep.networks import Full, Lora, set_weights
from fewstep.objectives.dmd import DMD
from fewstep.objectives.progressive import Progressive
from fewstep.objectives.tcd import TCD
from fewstep.plain import override
from fewstep.plan import plan
from fewstep.sampling import ddim, sample
from fewstep.verify import verify

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


# Whole runs on a tiny teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save(tiny_sd_pipeline(), tmp_path_factory.mktemp("teacher") / "sd"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory):
    """Encodings are kept for all tests, and no pictures are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(api.Preview, "__call__", lambda *_: None)
        yield


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


def trained(stage):
    """What a trained stage leaves: a student whose every weight has moved."""
    role = api.open_study(stage.config).roles["student"]
    left = {k: v.detach() + 0.05 * torch.randn_like(v) for k, v in role.weights().items()}
    checkpoint.save(stage.folder / "checkpoints", 2, {"ema": left}, {})
    return left


def begun(config, folder):
    """(what the first stage left, the study in which the second one starts)."""
    first, second = stages.stages_of(config, folder)
    left, study = trained(first), api.open_study(second.config)
    second.begin(study.roles)
    return left, study


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


@pytest.fixture
def straightened(teacher, tmp_path):
    """(sampler, last objective, **student) -> Config: reflow, then a stage that the reflowed student teaches."""
    words = tmp_path / "words.txt"
    words.write_text("a red circle\na blue square\na cross")

    def make(sampler="ddim", name="regression", lr=1e-3, **student):
        train = {"rounds": 1, "batch": 2, "lr": lr, "save_every": 1, "log_every": 1, "device": "cpu"}
        plain = {
            "teacher": {"path": teacher, "guidance": 2.0},
            "student": {"rank": 2, **student},
            "data": {"prompts": str(words), "pairs": 3, "pairs_steps": 3},
            "train": train,
            "stages": [
                {"objective": {"name": FIRST[sampler], "steps": 2, "sampler": sampler}},
                {"objective": {"name": name, "steps": 1}, "teacher": "previous", "train": {"lr": 1e-3}},
            ],
        }
        return parse(plain)

    return make


FIRST = {"ddim": "reflow", "renoise": "dmd1"}  # objectives that learn from pairs and are deployed so


def known(study, wish):
    return open_source(study.teacher, prompts=study.config.data.prompts, images_needed=False, pairs=wish, cache=None)


@pytest.mark.parametrize("sampler", ["ddim", "renoise"])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_a_student_is_taught_by_its_tutors_own_pairs(straightened, tmp_path, weights, sampler):
    """At the times the tutor is deployed at (in three steps samplers differ), without fresh noise, and unguided: it is guided."""
    config = straightened(sampler, weights=weights)
    _, study = begun(config, tmp_path / "run")
    source = known(study, study.pairs(config.stages[0]))
    student, times = study.student(study.roles["student"]), study.teacher.grid(3, sampler)  # still as the tutor is
    with torch.no_grad():
        own = sample(student, source.noise, times, study.teacher.encode(source.prompts), step=ddim, rng=None)
    torch.testing.assert_close(source.latents, own, rtol=1e-4, atol=1e-4)
    assert (known(study, study.pairs()).latents - own).abs().max() > 1e-2


def test_pairs_are_drawn_anew_for_another_tutor_and_for_no_other_reason(straightened, tmp_path, monkeypatch):
    drawn, plain = [], pairs._draw

    def draw(teacher, wish, *more):
        drawn.append(wish.drawn_by)
        return plain(teacher, wish, *more)

    def fit(job, **_):
        moved = {k: v + job.settings.lr for k, v in job.roles["student"].weights().items()}
        checkpoint.save(job.folder / "checkpoints", job.settings.rounds, {"ema": moved}, {})

    def run(folder, **changes):
        drawn.clear()
        api.train(straightened(**changes), tmp_path / folder)
        return [bool(who) for who in drawn]

    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pairs, "_draw", draw)
    monkeypatch.setattr(api, "fit", fit)
    assert run("first") == [False, True]
    assert run("again") == []
    assert run("other tutor", lr=1e-2) == [True]
    assert run("originals", lr=2e-2, name="flow_guided") == []


def test_a_tutor_is_its_weights_and_how_they_count(straightened, tmp_path):
    """The same matrices under another alpha are another student."""
    tutors = []
    for folder, alpha in (("a", 2.0), ("b", 8.0)):
        config = straightened(alpha=alpha)
        torch.manual_seed(0)
        left, study = begun(config, tmp_path / folder)
        tutors.append((left, study.pairs(config.stages[0]).drawn_by))
    (a, first), (b, second) = tutors
    assert all(torch.equal(v, b[k]) for k, v in a.items()) and first != second


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
