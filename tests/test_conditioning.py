"""A student that is handed pure noise at a cleaner timestep than its teacher's last: DMD2's 399."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from isolated import proofs_of
from test_export import RECORD, student
from tiny import Made

from fewstep.api import Run, train
from fewstep.config import parse
from fewstep.export import export
from fewstep.networks import Full, Lora
from fewstep.plan import plan
from fewstep.preview import Preview
from fewstep.schedules import DiscreteVP

FIRST = 399
TABLED = ("sd", "sd21", "sdxl", "pixart", "cogvideox", "dit", "ddpm")
# name: (teacher, how it was trained, sampler, steps)
EXPORTS = {
    "lora": ("sd", Lora(2), "renoise", 1),
    "velocity": ("sd21", Full(), "ddim", 4),
    "xl": ("sdxl", Full(), "renoise", 2),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Holds exports and runs."""
    return tmp_path_factory.mktemp("conditioning")


@pytest.fixture(scope="module")
def later(teachers):
    """name of a family: the teacher whose student is handed pure noise at FIRST."""
    return Made(lambda name: replace(teachers[name], first=FIRST))


def tree(root, path="nowhere", **parts):
    (root / "prompts.txt").write_text("a circle\na square\n")
    return {
        "teacher": {"path": str(path), "guidance": 2.0},
        "student": {"weights": "full", "conditioning_timestep": FIRST},
        "objective": {"name": "dmd", "steps": 1, "critic_turns": 1},
        "data": {"prompts": str(root / "prompts.txt")},
        "train": {"rounds": 1, "batch": 2, "lr": 2e-2, "ema": 0.0, "warmup": 1, "device": "cpu"},
        **parts,
    }


@pytest.fixture(scope="module")
def run(root, folders) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Preview, "__call__", lambda *_: None)
        return train(parse(tree(root, folders["sd"])), root / "run")


@pytest.fixture(scope="module")
def proofs(root, folders, later, run, tmp_path_factory):
    for name, (family, kind, sampler, steps) in EXPORTS.items():
        teacher = later[family]
        weights = student(teacher, kind)
        if name == "xl":  # as after training: its weights are no longer the folder's
            teacher.pipe.to(torch.bfloat16)
        export(teacher, kind, weights, sampler=sampler, steps=steps, to=root / name, record=RECORD)
    run.export(root / "of-a-run")
    bases = {name: str(folders[family]) if name == "lora" else "" for name, (family, *_) in EXPORTS.items()}
    return proofs_of(bases | {"of-a-run": ""}, root, tmp_path_factory.mktemp("scratch"))


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", TABLED)
def test_the_grid_begins_there_and_its_noise_levels_are_the_teachers(later, name, steps):
    teacher = later[name]
    assert isinstance(teacher.schedule, DiscreteVP)
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    for sampler in teacher.family.samplers:
        grid = torch.tensor(teacher.deployed_grid(steps, sampler), dtype=torch.float64)
        torch.testing.assert_close(teacher.schedule.model_time(grid), (FIRST + 1) * even - 1)
        own = replace(teacher, first=None).scheduler(sampler)
        found, wanted = (one.alphas_cumprod.double() for one in (teacher.scheduler(sampler), own))
        torch.testing.assert_close(found, wanted[: FIRST + 1], rtol=1e-5, atol=0)
        assert len(own.alphas_cumprod) == 1000


@pytest.mark.parametrize("name", [*EXPORTS, "of-a-run"])
def test_stock_diffusers_draws_what_the_library_draws(root, proofs, name):
    times = json.loads((root / name / "fewstep.json").read_text())["times"]
    assert {times[n][0] for n in ("1", "2", "4")} == {FIRST}
    assert not [c for c in proofs[name] if not c["ok"]]
    found = {c["name"] for c in proofs[name]}
    assert found >= {f"{what} at {n}" for what in ("times", "pixels") for n in (1, 2, 4)}


def test_tools_that_would_hand_it_less_noise_are_not_for_it(root, later, proofs):
    """ComfyUI starts at noise x sigma, here three quarters of what the student knows."""
    assert "ComfyUI would hand it less" in (root / "lora/README.md").read_text()
    assert "In ComfyUI: sampler" not in (root / "lora/README.md").read_text()
    for layout in ("comfyui", "kohya"):
        with pytest.raises(ValueError, match=f"{layout} is for tools .* pure noise at 399; export it for Diffusers"):
            kind = EXPORTS["lora"][1]
            given = {"sampler": "renoise", "steps": 1, "to": root / layout, "record": RECORD, "layout": layout}
            export(later["sd"], kind, student(later["sd"], kind), **given)
        assert not (root / layout).exists()


def test_a_run_learns_and_draws_where_it_is_deployed_and_its_teacher_stays_as_it_was(root, run):
    study = run.study
    assert study.teacher.schedule.model_time(torch.tensor(study.grid)).tolist() == pytest.approx([FIRST])
    assert study.teacher.grid(1, "ddim") == (1.0,)
    assert plan(run.config)["grid (network times)"] == {"1": [399.0], "2": [399.0, 199.0], "4": [399.0, 299.0, 199.0, 99.0]}
    other = Run(root / "run")
    other.config = other.config.model_copy(
        update={"student": run.config.student.model_copy(update={"conditioning_timestep": None})}
    )
    words = ["a circle"]
    assert (other.sample_teacher(words, 2) == run.sample_teacher(words, 2)).all()
    assert (other.sample(words, 1) != run.sample(words, 1)).any()


def test_an_error_of_the_noise_weighs_less_there(teachers):
    """d x0 / d eps = sigma / alpha: 14.6 at 999 and 1.2 at 399 of SD's table."""
    schedule = teachers["sd"].schedule
    alpha, sigma = schedule.alpha_sigma(torch.tensor([1.0, 0.4], dtype=torch.float64))
    assert (sigma / alpha).tolist() == pytest.approx([14.61, 1.16], abs=0.01)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            {"objective": {"name": "tcd"}, "data": {"images": "zoo:sprites"}},
            "objective tcd asks its student at the time of its input's noise",
        ),
        (
            {"objective": {"name": "phased_dmd", "phase_rounds": 1}, "train": {"rounds": 9}},
            "objective phased_dmd asks its student at the time of its input's noise",
        ),
        (
            {"objective": {"name": "adversarial", "inner": {"name": "consistency"}}, "data": {"images": "zoo:sprites"}},
            "objective adversarial asks its student at the time of its input's noise",
        ),
        ({"student": {"conditioning_timestep": 0}}, "student.conditioning_timestep: Input should be greater than or equal to 1"),
        (
            {
                "data": {"prompts": "zoo:sprites", "pairs": 2},
                "stages": [{}, {"objective": {"name": "regression"}, "teacher": "previous"}],
            },
            "stages.2: teacher: a student with a conditioning_timestep knows its own walk alone",
        ),
    ],
)
def test_who_cannot_begin_elsewhere_is_refused_where_the_config_is_read(root, parts, said):
    with pytest.raises(ValueError, match=said):
        parse(tree(root, **parts))


@pytest.mark.parametrize(
    ("name", "first", "said"), [("sd", 1000, "1 to 999, not 1000"), ("zimage", 399, "has not; leave it away")]
)
def test_a_timestep_that_the_teacher_has_not_is_refused_before_training(root, folders, name, first, said):
    for look in (plan, lambda config: train(config, root / "nothing")):
        with pytest.raises(ValueError, match=f"student.conditioning_timestep is a .*{said}"):
            look(parse(tree(root, folders[name], student={"conditioning_timestep": first})))
    assert not (root / "nothing").exists()
