"""plan: what a config would do, told without weights, and every config that ships."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny import MAKERS, save, tiny_ddpm_pipeline, tiny_sd_pipeline, tiny_zimage_pipeline

from fewstep.config import load, parse
from fewstep.folders import teacher_folder
from fewstep.plan import plan

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
RECIPES = [file for file in CONFIGS if file.parent.name == "recipes"]
TWINS = {
    "sd15": "sd",
    "sdxl": "sdxl",
    "sd35": "sd3",
    "flux1": "flux",
    "flux2": "klein",
    "sana": "sana",
    "qwen": "qwen",
    "wan21": "wan",
    "wan22": "wan22",
}
PLAIN = {"teacher": {"path": "zoo:sprites-sd"}, "objective": {"name": "dmd", "steps": 2}, "data": {"prompts": "zoo:sprites"}}


def tree(**parts):
    return {**PLAIN, **parts}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    makers = {"sd": tiny_sd_pipeline, "zimage": tiny_zimage_pipeline, "ddpm": tiny_ddpm_pipeline}
    return {name: save(make(), tmp_path_factory.mktemp(name) / "pipe") for name, make in makers.items()}


@pytest.mark.parametrize("name", ["sd", "zimage", "ddpm"])
def test_a_plan_tells_the_truth_and_reads_no_weights(folders, tmp_path, name):
    from fewstep.api import open_study

    config = parse(tree(teacher={"path": str(folders[name])}, student={"rank": 2}, critic={"weights": "full"}))
    study = open_study(config)
    bare = shutil.copytree(folders[name], tmp_path / "bare")
    for file in bare.rglob("*.safetensors"):
        file.unlink()
    found = plan(parse(tree(teacher={"path": str(bare)}, student={"rank": 2}, critic={"weights": "full"})))
    schedule = study.teacher.schedule
    for n in (1, 2, 4):
        times = schedule.model_time(torch.tensor(study.teacher.grid(n, study.sampler), dtype=torch.float64))
        assert found["grid (network times)"][str(n)] == pytest.approx(times.tolist(), abs=1e-3)
    assert found["trained parameters"] == {k: sum(p.numel() for p in study.roles[k].parameters()) for k in ("student", "critic")}
    assert found["sampler"].startswith(study.sampler)
    json.dumps(found)


@pytest.mark.parametrize(
    ("teacher", "objective", "student", "at"),
    [
        ("sprites-sd", {"name": "dmd", "steps": 1}, {}, "14.6 times.*timestep: 399 it is 1.2 times"),
        ("sprites-sd", {"name": "sid", "steps": 4}, {"weights": "lora"}, "14.6 times.*timestep: 699 it is 3.3 times"),
        ("sprites-sd", {"name": "dmd", "steps": 1}, {"conditioning_timestep": 399}, None),
        ("sprites-sd", {"name": "tcd", "steps": 4}, {}, None),  # learns from noised data, and may not begin elsewhere
        ("sprites-flow", {"name": "dmd", "steps": 1}, {}, None),  # a velocity's error is no larger at the noise end
    ],
)
def test_a_plan_says_where_an_error_of_noise_is_large_in_the_picture(teacher, objective, student, at):
    data = {"images": "zoo:sprites"} if objective["name"] == "tcd" else {"prompts": "zoo:sprites"}
    found = plan(parse(tree(teacher={"path": f"zoo:{teacher}"}, objective=objective, student=student, data=data)))
    assert ("advice" not in found) if at is None else re.search(at, found["advice"])


def test_a_plan_refuses_what_could_not_be_trained(folders, tmp_path):
    def refused(said, path, steps=2):
        with pytest.raises(ValueError, match=said) as error:
            plan(parse(tree(teacher={"path": str(path)}, objective={"name": "dmd", "steps": steps})))
        assert "\n" not in str(error.value)

    refused("choose another step count", folders["sd"], steps=101)
    refused("there is no teacher at", tmp_path / "nowhere")
    refused("is a hub id; plan reads folders only", "owner/model")
    broken = shutil.copytree(folders["ddpm"], tmp_path / "broken")
    (broken / "unet/config.json").unlink()
    refused("unet/config.json is missing or damaged", broken)
    with pytest.raises(ValueError, match="no stock scheduler of this family computes the sampler 'tcd'"):
        plan(parse(tree(teacher={"path": str(folders["sd"])}, objective={"name": "dmd", "sampler": "tcd"})))


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Tiny pipelines of the classes that the recipes are for, by the first word of a recipe's name."""
    root = tmp_path_factory.mktemp("twins")
    return {word: (str(save(MAKERS[name][0](), root / word)), MAKERS[name][1]) for word, name in TWINS.items()}


@pytest.mark.skipif(not CONFIGS, reason="this checkout has no configs/")
@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_every_config_that_ships_parses_and_plans(file, request):
    config = load(file)
    if file in RECIPES:  # the same settings on a tiny pipeline of the same class, at its size
        path, size = request.getfixturevalue("twins")[file.stem.split("-")[0]]
        assert size is None or config.teacher.size is None or len(size) == len(config.teacher.size)
        teacher = {"teacher": config.teacher.model_copy(update={"path": path, "size": size})}
        config = config.model_copy(update={**teacher, "stages": tuple(s.model_copy(update=teacher) for s in config.stages)})
    found = plan(config)
    assert found["settings"]["train"]["rounds"] == config.train.rounds
    assert set(found["trained parameters"]) >= {"student", *config.objective.needs.roles}
    assert str(config.objective.steps) in found["grid (network times)"]


@pytest.mark.skipif(not RECIPES, reason="this checkout has no configs/")
def test_a_recipe_says_whose_settings_on_what_hardware_and_that_it_was_not_run():
    assert {file.stem.split("-")[0] for file in RECIPES} == set(TWINS)
    for file in RECIPES:
        head = file.read_text().split("teacher:")[0]
        for word in (
            "Paper:",
            "Run:",
            "Authors:",
            "Ours:",
            "Hardware:",
            "hour",
            "*Not run here.*",
            f"configs/recipes/{file.name}",
        ):
            assert word in head, (file.name, word)
        assert teacher_folder(load(file).teacher.path) is None, file  # a hub id
