"""A user's mistake costs one or two lines and exit code 2, and changes nothing on disk."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fewstep import api

ROOT = Path(__file__).parents[2]


# Configs


def test_an_unknown_key(refused, config):
    said = "train.rouns: unknown option; did you mean rounds"
    for verb in ("train", "plan"):
        refused(said, verb, config(), "--set", "train.rouns=3")
        refused("tekcher: unknown option; did you mean teacher", verb, config(tekcher={}))


def test_no_config(refused, tmp_path):
    refused("there is no config at nowhere.yaml; `fewstep list configs`", "train", "nowhere.yaml")
    refused("there is no config at", "plan", tmp_path)


def test_an_override_without_a_value(refused, config):
    refused("--set wants KEY=VALUE", "train", config(), "--set", "train.rounds")
    refused("the value is not YAML", "train", config(), "--set", "train.rounds=[1")


# Teachers


def test_a_teacher_that_is_not_there(refused, config, tmp_path):
    for verb in ("train", "plan"):
        refused(
            "there is no teacher at .*nowhere; give zoo:NAME, a Diffusers", verb, config(teacher={"path": f"{tmp_path}/nowhere"})
        )
    refused("the teacher models/nowhere cannot be loaded .*give a folder", "train", config(teacher={"path": "models/nowhere"}))
    said = "the configs of models/nowhere are not in the Hugging Face cache .*; check the id and the network"
    refused(said, "plan", config(teacher={"path": "models/nowhere"}))
    refused(
        "the zoo has no 'sprites-xl'; its teachers are zoo:sprites-sd, zoo:sprites-flow, zoo:clouds-sd, zoo:clouds-flow; "
        "pictures are judged",
        "train",
        config(teacher={"path": "zoo:sprites-xl"}),
    )


def test_a_teacher_of_another_size_than_it_draws_at(refused, config, teacher):
    for verb in ("train", "plan"):
        wrong = config(teacher={"path": str(teacher), "size": [63, 63]})
        refused(r"teacher.size \[63, 63\] is none that StableDiffusionPipeline draws at .*divisible by 8", verb, wrong)


def test_the_yardstick_is_no_teacher(refused, config):
    for verb in ("train", "plan"):
        refused("zoo:sprites-clip is not a Diffusers pipeline folder", verb, config(teacher={"path": "zoo:sprites-clip"}))


def test_a_teacher_without_a_known_denoiser(refused, config, teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    for verb in ("train", "plan"):
        refused(
            "KandinskyPipeline is not a family fewstep knows .*StableDiffusionPipeline",
            verb,
            config(teacher={"path": str(folder)}),
        )


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl", ".ckpt"])
def test_a_teacher_with_a_pickle(refused, config, teacher, tmp_path, suffix):
    folder = shutil.copytree(teacher, tmp_path / "copy")
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / f"unet/diffusion_pytorch_model{suffix}")
    for verb in ("train", "plan"):
        refused(rf"diffusion_pytorch_model{suffix} is a pickle.*safetensors", verb, config(teacher={"path": str(folder)}))


def test_a_teacher_that_is_damaged(refused, config, teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "copy")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused("cannot be loaded .*save it again with pipe.save_pretrained", "train", config(teacher={"path": str(folder)}))


@pytest.mark.parametrize("network", ["cross_attention_dim: 7", "in_channels: 3", "layers_per_block: -1", "out_channels: 3"])
def test_a_student_that_does_not_fit_its_teacher(refused, config, network, monkeypatch):
    heard = []
    monkeypatch.setattr(logging.getLogger("torch._subclasses.fake_tensor"), "handle", heard.append)
    said = "student.network: the student does not take what its teacher takes"
    for verb in ("train", "plan"):
        refused(said, verb, config(), "--set", f"student={{weights: full, network: {{{network}}}}}")
    assert not heard  # of what networks without weights run into, torch would print a traceback


# Data


def test_images_where_there_are_none(refused, config, tmp_path):
    consistency = {"name": "consistency", "steps": 1, "solver_steps": 4}
    for verb in ("train", "plan"):
        refused("objective consistency needs images: add data.images", verb, config(objective=consistency))
    (tmp_path / "images").mkdir()
    refused("holds no images; put", "train", config(objective=consistency, data={"images": f"{tmp_path}/images"}))
    refused("there are no images at", "train", config(objective=consistency, data={"images": f"{tmp_path}/nowhere"}))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no prompts; write at least one"),
        (b" \n\n", "holds no prompts"),
        (b"caf\xe9", "is not UTF-8 .byte 3, line 1.; save it as UTF-8"),
    ],
)
def test_prompts_that_are_none(refused, config, tmp_path, content, said):
    (tmp_path / "wrong.txt").write_bytes(content)
    refused(said, "train", config(data={"prompts": f"{tmp_path}/wrong.txt"}))


def test_prompts_that_are_not_there(refused, config, tmp_path):
    for verb in ("train", "plan"):
        refused("there is no file of prompts at", verb, config(data={"prompts": f"{tmp_path}/nowhere.txt"}))
    consistency = {"name": "consistency", "steps": 1, "solver_steps": 4}
    for absent in (f"{tmp_path}/nowhere", f"{tmp_path}/*.tar", "zoo:birds"):
        refused("there are no images at", "plan", config(objective=consistency, data={"images": absent}))
    refused("data needs exactly one of prompts and images", "train", config(data={}))


# Grids and devices


def test_steps_that_no_scheduler_makes(refused, config, trained, tmp_path):
    for verb in ("train", "plan"):
        refused("cannot make 101 steps, 100 at most; choose another step count", verb, config(), "--set", "objective.steps=101")
        refused(
            "no stock scheduler of this family computes the sampler 'tcd'; it has",
            verb,
            config(),
            "--set",
            "objective.sampler=tcd",
        )
    export = api.Run(trained[1]).export(tmp_path / "export")
    for target in (trained[1], export):
        said = "LCMScheduler cannot make 101 steps, 100 at most; choose another step count"
        refused(said, "sample", target, "--prompt", "a star", "--steps", "101")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(refused, config):
    refused("no usable CUDA device; set train.device to cpu or auto", "train", config(), "--set", "train.device=cuda")


# Runs


def test_a_folder_that_holds_another_run(refused, trained, tmp_path):
    refused(
        "already holds a run; add --resume to go on with it, or name another folder", "train", trained[0], "--out", trained[1]
    )
    refused("holds other files and no run; name an empty folder", "train", trained[0], "--out", ROOT / "fewstep")


def test_a_run_that_is_a_file(refused, trained, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused("file is a file; name a folder with --out", "train", trained[0], "--out", tmp_path / "file")


def test_a_resume_with_another_config(refused, trained):
    said = "was made with another train.lr; resume with its own config.yaml, or name another --out"
    refused(said, "train", trained[0], "--out", trained[1], "--resume", "--set", "train.lr=0.5")
    refused("there is no run at .*; leave --resume away", "train", trained[0], "--out", "nowhere", "--resume")


def test_a_resume_to_fewer_rounds_than_are_done(refused, trained):
    said = "has trained 2 rounds already, more than train.rounds=1; set that to 2 or more"
    refused(said, "train", trained[0], "--out", trained[1], "--resume", "--set", "train.rounds=1")


def test_a_checkpoint_that_has_no_number(refused, trained, tmp_path):
    run = shutil.copytree(trained[1], tmp_path / "run")
    (run / "checkpoints/step-0000002").rename(run / "checkpoints/step-abc")
    for verb in (("sample", run, "--prompt", "a star"), ("export", run, "--to", tmp_path / "export")):
        refused("step-abc is no checkpoint: its name ends in no number of rounds", *verb)


def test_a_truncated_checkpoint(refused, trained, tmp_path):
    run = shutil.copytree(trained[1], tmp_path / "run")
    for file in run.glob("checkpoints/step-0000002/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    said = "checkpoints/step-0000002 is damaged .*remove that folder to go on from the one before it"
    refused(said, "train", trained[0], "--out", run, "--resume", "--set", "train.rounds=3")
    refused(said, "sample", run, "--prompt", "a star")
    refused(said, "export", run, "--to", tmp_path / "export")


def test_what_is_no_run(refused, tmp_path):
    for verb in (("sample", "--prompt", "a star"), ("export", "--to", "there")):
        refused("is not a run folder: it has no config.yaml", verb[0], tmp_path / "nowhere", *verb[1:])
    refused("is not a fewstep export", "verify", tmp_path)
    refused("holds no results, grids or curves; name a run that has begun, or what was scored", "report", tmp_path)
    refused("there is no folder nowhere; name a run", "report", "nowhere")


def test_a_run_without_a_checkpoint(refused, trained, tmp_path):
    run = shutil.copytree(trained[1], tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    refused("has no checkpoint yet; `fewstep train ... --resume` goes on with it", "sample", run, "--prompt", "a star")


def test_pictures_of_nothing_or_over_something(refused, trained, tmp_path):
    refused("nothing to draw; give --prompt TEXT or --prompts FILE", "sample", trained[1])
    refused("is a folder; give a file of prompts, a .txt, .jsonl or .csv\n", "sample", trained[1], "--prompts", tmp_path)
    refused("zoo:sprites-sd is a teacher.*sample RUN --compare-teacher", "sample", "zoo:sprites-sd", "--prompt", "x")
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/samples"):
        refused("file is a file; name a folder with --out", "sample", trained[1], "--prompt", "x", "--out", tmp_path / out)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("years of work")
    refused(
        "holds other files; name an empty folder with --out", "sample", trained[1], "--prompt", "x", "--out", tmp_path / "thesis"
    )
    refused("is not a fewstep export; choose another folder", "export", trained[1], "--to", tmp_path / "thesis")


# Evaluation


def test_moments_of_another_extractor(refused, tmp_path, monkeypatch):
    from fewstep.evaluation import protocol
    from fewstep.evaluation.frechet import Moments

    class Other:
        id = "open_clip:other@1234"

    monkeypatch.setattr(protocol, "_extractor", lambda name, batch: Other())
    Moments.of(np.random.default_rng(0).normal(size=(40, 4)), extractor="inception:2015", source="x").save(
        tmp_path / "moments.npz"
    )
    (tmp_path / "prompts.txt").write_text("a star\n" * 8)
    rules = {"name": "mine", "prompts": "prompts.txt", "n": 8, "seed": 0, "extractor": "zoo:other", "reference": "moments.npz"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8)).save(tmp_path / f"pictures/{i}.png")
    refused("inception:2015", "eval", "pictures", "--protocol", "mine.yaml")


def test_a_protocol_that_is_not_known(refused, trained):
    refused("unknown protocol 'sprite'; did you mean sprites", "eval", trained[1], "--protocol", "sprite")


def test_a_run_is_judged_beside_the_users_own_images_or_told_how(refused, trained, tmp_path):
    refused("says no reference; give --reference FOLDER .your images. and --prompts FILE", "eval", trained[1])
    refused("--prompts", "eval", trained[1], "--reference", tmp_path)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'config'"),
        (["sample", "x", "--sede", "1"], "No such option"),
        (["sample", "x", "--steps", "0"], "--steps wants counts of at least 1, as in --steps 1,2,4, not '0'"),
        (["sample", "x", "--steps", "-1"], "--steps wants counts of at least 1"),
        (["eval", "x", "--protocol", "sprites", "--steps", "1,x"], "--steps wants counts .* not 'x'"),
        (["sample", "x", "--steps", "1", "2", "4"], "unexpected extra argument.*; several counts are --steps 1,2,4"),
        (["sample", "x", "--seed", "-1"], "Invalid value for '--seed'"),
        (["sample", "x", "--seed", "one"], "Invalid value for '--seed'"),
        (["list", "teecher"], "there is no list of 'teecher'; there are lists of objectives, teachers, configs"),
    ],
)
def test_a_slip_on_the_command_line(refused, arguments, said):
    refused(said, *arguments)
