"""plan: what a config would do, told without weights, and every config that ships."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects, httpx
from tiny import MAKERS, save, tiny_ddpm_pipeline, tiny_sd_pipeline, tiny_zimage_pipeline
from transformers import CLIPConfig, CLIPImageProcessor

from fewstep import hub
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
    broken = shutil.copytree(folders["ddpm"], tmp_path / "broken")
    (broken / "unet/config.json").unlink()
    refused("unet/config.json is missing or damaged", broken)
    with pytest.raises(ValueError, match="no stock scheduler of this family computes the sampler 'tcd'"):
        plan(parse(tree(teacher={"path": str(folders["sd"])}, objective={"name": "dmd", "sampler": "tcd"})))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """cache(folder): puts its configs, as the hub's client does, under owner/model into a cache of this test's own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(folder, *, ignore="*.safetensors"):
        place, commit = tmp_path / "hub/models--owner--model", "0" * 40
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs/main").write_text(commit)
        return shutil.copytree(folder, place / "snapshots" / commit, ignore=shutil.ignore_patterns(ignore), dirs_exist_ok=True)

    return put


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A pipeline with all the parts that Stable Diffusion 1.5 has on the hub."""
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    clip = CLIPConfig(text_config=small, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=8)
    more = {"safety_checker": StableDiffusionSafetyChecker(clip), "feature_extractor": CLIPImageProcessor()}
    pipe = StableDiffusionPipeline(**{**tiny_sd_pipeline().components, **more})
    return save(pipe, tmp_path_factory.mktemp("checked") / "pipe")


def named(path):
    return parse(tree(teacher={"path": str(path)}, student={"weights": "lora", "rank": 2}, critic={"weights": "full"}))


@pytest.mark.parametrize("name", ["checked", "folders"])
def test_a_hub_id_in_the_cache_plans_as_its_folder_does(cache, request, name):
    folder = request.getfixturevalue(name)
    folder = folder["zimage"] if name == "folders" else folder
    there = cache(folder)
    assert not list(there.rglob("*.safetensors"))
    by_id, by_folder = (plan(named(path)) for path in ("owner/model", folder))
    told = by_id.pop("teacher"), by_folder.pop("teacher")
    assert told[0] == told[1].replace(str(folder), "owner/model")
    assert by_id.pop("settings")["teacher"]["path"] == "owner/model" and by_folder.pop("settings")
    assert by_id == by_folder


def test_of_a_hub_id_that_the_cache_has_in_part_no_weights_are_fetched(cache, folders, monkeypatch):
    """Somebody has fetched its index alone."""
    cache(folders["sd"], ignore="[!m]*")
    asked = []

    def fetch(hub_id, *, allow_patterns, local_files_only):
        asked.append((hub_id, local_files_only, allow_patterns))
        there = snapshot_download(hub_id, allow_patterns=allow_patterns, local_files_only=True)
        return there if local_files_only else cache(folders["sd"])

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert plan(named("owner/model"))["teacher"].startswith("owner/model")
    assert [x[:2] for x in asked] == [("owner/model", True), ("owner/model", False)]
    every = [str(file.relative_to(folders["sd"])) for file in folders["sd"].rglob("*") if file.is_file()]
    weights = [file for file in every if file.endswith(".safetensors")]
    assert weights and list(filter_repo_objects(every, allow_patterns=asked[1][2])) == [f for f in every if f not in weights]


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("No route.\nMore."), OfflineModeIsEnabled("Offline."), OSError("Full."), None]
)
def test_a_hub_that_does_not_give_the_configs_is_a_sentence(cache, tmp_path, monkeypatch, error):
    def fetch(hub_id, *, allow_patterns, local_files_only):
        if error is not None:
            raise error
        return str(tmp_path)  # of something that is no pipeline

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    with pytest.raises(ValueError, match="configs of owner/model are not in .* or give a folder$") as refused:
        plan(named("owner/model"))
    assert (str(error).split(".")[0] if error else "not a whole Diffusers pipeline") in str(refused.value)
    assert "\n" not in str(refused.value)


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
