"""The command line: a user's mistake costs one or two lines and exit code 2, and changes nothing on disk."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from tiny import save, tiny_sd_pipeline

from fewstep import api, cli
from fewstep.config import parse

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """The bars of other packages; the command itself switches them off by an environment variable, before it imports them."""
    for package in (diffusers, transformers):
        package.utils.logging.disable_progress_bar()
    yield
    for package in (diffusers, transformers):
        package.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save(tiny_sd_pipeline(), tmp_path_factory.mktemp("teacher") / "sd")


@pytest.fixture(scope="module")
def trained(teacher, tmp_path_factory):
    """(config file, run folder) of a run of two rounds."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings(teacher, folder / "prompts.txt")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(folder / "cache"))
        patch.setattr(api.Preview, "__call__", lambda *_: None)
        api.train(parse(yaml.safe_load(config.read_text())), folder / "run")
    return config, folder / "run"


def settings(teacher, prompts):
    return {
        "teacher": {"path": str(teacher), "guidance": 2.0},
        "student": {"rank": 2},
        "critic": {"rank": 2},
        "objective": {"name": "dmd", "steps": 1, "critic_turns": 1},
        "data": {"prompts": str(prompts)},
        "train": {"rounds": 2, "batch": 1, "save_every": 1, "log_every": 1, "device": "cpu"},
    }


class Result:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """fewstep(*arguments) -> Result, in this process and in an empty folder."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TQDM_DISABLE", "1")  # `main` sets it; here it must not outlive the test
    monkeypatch.setattr(api.Preview, "__call__", lambda *_: None)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main()
        said = capsys.readouterr()
        return Result(done.value.code or 0, said.out, said.err)

    return run


def contents(*folders):
    return {
        str(f): f.read_bytes() for folder in folders for f in Path(folder).rglob("*") if f.is_file() and "cache" not in f.parts
    }


def is_refusal(result, said):
    lines = result.err.strip().splitlines()
    assert result.code == 2, (result.code, result.out, result.err)
    assert 1 <= len(lines) <= 2 and lines[0].startswith("fewstep: "), result.err
    assert "Traceback" not in result.err + result.out and result.out == ""
    assert re.search(said, result.err), result.err


@pytest.fixture
def refused(command, trained, tmp_path):
    """refused(what it says, *arguments): the command is refused, in words, and every file is as it was."""

    def check(said, *arguments):
        before = contents(tmp_path, trained[0].parent)
        is_refusal(command(*arguments), said)
        assert contents(tmp_path, trained[0].parent) == before

    return check


@pytest.fixture
def config(teacher, tmp_path):
    """config(**parts) -> a config file; parts replace whole sections."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")

    def write(**parts):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({**settings(teacher, tmp_path / "prompts.txt"), **parts}))
        return file

    return write


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
    refused("is a hub id; plan reads folders only", "plan", config(teacher={"path": "models/nowhere"}))
    refused("the zoo has no 'sprites-xl'; it has", "train", config(teacher={"path": "zoo:sprites-xl"}))


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
    refused("there is no file of prompts at", "train", config(data={"prompts": f"{tmp_path}/nowhere.txt"}))
    refused("data needs exactly one of prompts and images", "train", config(data={}))


# Grids and devices


def test_steps_that_no_scheduler_makes(refused, config, trained):
    for verb in ("train", "plan"):
        refused("cannot make 101 steps .*choose another step count", verb, config(), "--set", "objective.steps=101")
        refused(
            "no stock scheduler of this family computes the sampler 'tcd'; it has",
            verb,
            config(),
            "--set",
            "objective.sampler=tcd",
        )
    refused("cannot make 101 steps", "sample", trained[1], "--prompt", "a star", "--steps", "101")


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
    refused("file", "train", trained[0], "--out", tmp_path / "file")


def test_a_resume_with_another_config(refused, trained):
    said = "was made with another train.lr; resume with its own config.yaml, or name another --out"
    refused(said, "train", trained[0], "--out", trained[1], "--resume", "--set", "train.lr=0.5")
    refused("there is no run at .*; leave --resume away", "train", trained[0], "--out", "nowhere", "--resume")


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
    refused("has no results.json; `fewstep eval", "report", tmp_path)


def test_a_run_without_a_checkpoint(refused, trained, tmp_path):
    run = shutil.copytree(trained[1], tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    refused("has no checkpoint yet; `fewstep train ... --resume` goes on with it", "sample", run, "--prompt", "a star")


def test_pictures_of_nothing_or_over_something(refused, trained, tmp_path):
    refused("nothing to draw; give --prompt TEXT or --prompts FILE", "sample", trained[1])
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
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures/0.png")
    refused("inception:2015", "eval", "pictures", "--protocol", "mine.yaml")


def test_a_protocol_that_is_not_known(refused, trained):
    refused("unknown protocol 'sprite'; did you mean sprites", "eval", trained[1], "--protocol", "sprite")


# Arguments


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'config'"),
        (["sample", "x", "--sede", "1"], "No such option"),
        (["sample", "x", "--seed", "one"], "Invalid value for '--seed'"),
        (["list", "teecher"], "there is no list of 'teecher'; there are lists of objectives, teachers, configs"),
    ],
)
def test_a_slip_on_the_command_line(refused, arguments, said):
    refused(said, *arguments)


# What goes well, and what is our fault


def test_a_run_from_the_command_line(command, trained, tmp_path):
    done = command("train", trained[0], "--out", "run", "--set", "train.rounds=1")
    assert done.code == 0 and "trained: run/checkpoints/step-0000001" in done.out
    assert "train: 1/1" in done.err and "\r" not in done.err
    done = command("train", trained[0], "--out", "run", "--resume")
    assert done.code == 0 and "step-0000002" in done.out
    done = command("sample", "run", "--prompt", "a star", "--prompt", "a cross", "--steps", "1", "--steps", "2", "--out", "drawn")
    assert done.code == 0, done.err
    assert Image.open(tmp_path / "drawn/grid.png").size == (2 * 64 + 2, 2 * 64 + 2)
    assert sorted(f.name for f in (tmp_path / "drawn").iterdir()) == ["grid.png", "student-1", "student-2"]


@pytest.mark.parametrize(
    "arguments", [("doctor",), ("list", "objectives"), ("list", "teachers"), ("list", "configs"), ("plan", None)]
)
def test_json_is_json(command, config, arguments):
    given = [config() if a is None else a for a in arguments]
    done = command(*given, "--json")
    assert done.code == 0 and done.err == ""
    assert json.loads(done.out) is not None
    plain = command(*given)
    assert plain.code == 0
    if given[0] != "list" or given[1] != "configs":
        assert len(plain.out.splitlines()) > 1


def test_a_failed_proof_is_exit_code_2(command, monkeypatch):
    import fewstep.verify
    from fewstep.verify import Check, Report

    monkeypatch.setattr(fewstep.verify, "verify", lambda *_: Report(False, (Check("times", False, "off by one"),)))
    done = command("verify", "export")
    assert (done.code, done.out) == (2, "NOT times: off by one\n")
    monkeypatch.setattr(fewstep.verify, "verify", lambda *_: Report(True, (Check("times", True, "0"),)))
    assert command("verify", "export").code == 0


def test_ctrl_c_is_exit_code_130_and_says_how_to_go_on(command, trained, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "train", stopped)
    done = command("train", trained[0], "--out", trained[1])
    assert done.code == 130
    assert done.out == f"stopped; to go on: fewstep train {trained[1]}/config.yaml --out {trained[1]} --resume\n"
    done = command("train", trained[0], "--out", "new")
    assert done.code == 130 and done.out == "stopped; to go on: the same command, for nothing was begun\n"


def test_our_own_fault_is_a_traceback(command, trained, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(api, "train", broken)
    monkeypatch.setattr(sys, "argv", ["fewstep", "train", str(trained[0])])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


# Real processes


def process(*command, **environment):
    merged = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    merged.pop("TQDM_DISABLE", None)
    return subprocess.run([sys.executable, *map(str, command)], env=merged, capture_output=True, text=True, check=False)


def test_help_needs_nothing_heavy():
    """Every command's: what they do is imported when they do it."""
    script = """
import sys
from fewstep import cli
for word in ("", "train", "sample", "plan", "eval", "export", "verify", "push", "demo", "doctor", "list", "report"):
    sys.argv = ["fewstep", *word.split(), "--help"]
    try:
        cli.main()
    except SystemExit as done:
        assert not done.code, word
print(sorted({"torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "PIL", "yaml"} & sys.modules.keys()))
"""
    done = process("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.count("Usage: fewstep") == 12


def test_nothing_but_the_sentence_is_on_stderr(teacher, tmp_path):
    """With a teacher that is really loaded, whose libraries have much to say."""
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings(teacher, tmp_path / "prompts.txt")))
    done = process("-m", "fewstep", "train", tmp_path / "config.yaml", "--out", tmp_path / "run", FEWSTEP_CACHE=str(tmp_path))
    is_refusal(Result(done.returncode, done.stdout, done.stderr), "is not UTF-8 .*save it as UTF-8")
    assert not (tmp_path / "run").exists()
