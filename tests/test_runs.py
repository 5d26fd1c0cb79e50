"""Runs on a tiny teacher: going on is as if nothing had happened, and what a run's folder holds."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty import SETTINGS, metrics, same
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fewstep import api, checkpoint
from fewstep.config import load, parse
from fewstep.networks import Role
from fewstep.trainer import Player, make_accelerator

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def teacher(folders):
    return str(folders["sd"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "prompts.txt").write_text("a red circle\na blue square\na star\n")
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    for i in range(3):
        Image.fromarray(pixels[i]).save(folder / f"images/{i}.png")
        (folder / f"images/{i}.txt").write_text(f"number {i}")
    return {"dmd": {"prompts": str(folder / "prompts.txt")}, "consistency": {"images": str(folder / "images")}}


@pytest.fixture
def setup(teacher, data, tmp_path, monkeypatch, request):
    """(objective, weights, **train) -> Config; no pictures are drawn unless a test is marked `pictures`."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(api.Preview, "__call__", lambda *_: None)

    def make(objective="dmd", weights="lora", **train):
        options = {
            "dmd": {"steps": 2, "critic_turns": 1},
            "consistency": {"steps": 2, "solver_steps": 4},
            "phased_dmd": {"steps": 2, "phase_rounds": 2, "critic_turns": 1},
            "adversarial": {"inner": {"name": "dmd", "steps": 2, "critic_turns": 1}, "r1": 0.1},
        }[objective]
        chosen = {"rounds": 1, "batch": 2, "lr": 1e-3, "save_every": 3, "log_every": 1, "device": "cpu", **train}
        return parse(
            {
                "teacher": {"path": teacher, "guidance": 2.0},
                "student": {"weights": weights, "rank": 2},
                "critic": {"weights": weights, "rank": 2},
                "objective": {"name": objective, **options},
                "data": data["dmd" if objective.endswith("dmd") else "consistency"],
                "train": chosen,
            }
        )

    return make


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def weights_of(run):
    """All that a checkpoint holds, byte for byte."""
    return contents(checkpoint.latest(run / "checkpoints"))


@pytest.mark.parametrize(
    ("objective", "weights"), [("dmd", "lora"), ("consistency", "full"), ("adversarial", "lora"), ("phased_dmd", "lora")]
)
def test_resume_is_bitwise(setup, tmp_path, objective, weights):
    """Of phased_dmd inside its second phase: the critic that started anew there goes on."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    api.train(setup(objective, weights, rounds=6), whole)
    api.train(setup(objective, weights, rounds=3), parts)
    first = weights_of(parts)
    api.train(setup(objective, weights, rounds=6), parts, resume=True)
    roles = {"student", *setup(objective, rounds=6).objective.needs.roles}
    assert weights_of(whole).keys() == {"state.json", "ema.safetensors"} | {
        f"{kind}{role}.safetensors" for role in roles for kind in ("", "optimizer-")
    }
    assert weights_of(parts) == weights_of(whole) and first.keys() == weights_of(whole).keys()
    assert all(first[name] != value for name, value in weights_of(whole).items())
    assert metrics(parts) == metrics(whole) and len(metrics(whole)) == 6


def test_resume_between_two_phases_is_bitwise(setup, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    api.train(setup("phased_dmd", rounds=3), whole)
    api.train(setup("phased_dmd", rounds=3, save_every=2), parts)
    shutil.rmtree(parts / "checkpoints/step-0000003")
    api.train(setup("phased_dmd", rounds=3), parts, resume=True)
    assert weights_of(parts) == weights_of(whole)
    steps = load_file(whole / "checkpoints/step-0000003/optimizer-critic.safetensors")
    assert {int(v) for k, v in steps.items() if k.endswith(":step")} == {1}  # of the second phase alone


def test_a_player_that_starts_afresh_has_its_first_weights_and_an_optimizer_that_knows_nothing():
    role = Role("critic", nn.Linear(2, 2), owns=True, dtype=torch.float32)
    first = {k: p.detach().clone() for k, p in role.weights().items()}
    player = Player(role, SETTINGS, make_accelerator(SETTINGS), restarts=True)
    for _ in range(2):
        player.module(torch.ones(1, 2)).sum().backward()
        player.update(0.1, 1.0)
        assert not same(first, role.weights()) and player.optimizer_tensors()
        player.restart()
        assert same(first, role.weights()) and not player.optimizer_tensors()


def test_another_objective_trains_a_mixture_too(setup, tmp_path):
    config = setup("consistency", "full", rounds=2)
    mixed = config.model_copy(update={"student": config.student.model_copy(update={"phases": 2})})
    weights = api.train(mixed, tmp_path / "run").weights
    assert {k.split(".")[0] for k in weights} == {"0", "1"}
    assert any(not torch.equal(v, weights[f"1{k[1:]}"]) for k, v in weights.items() if k[0] == "0")


def test_a_run_folder_holds_what_the_design_names(setup, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    run = api.train(setup(rounds=2, save_every=1), tmp_path / "run")
    names = {f.name for f in run.folder.iterdir()}
    assert names - {"tensorboard", "advice.jsonl"} == {"config.yaml", "metrics.jsonl", "grids", "checkpoints"}
    assert [f.name for f in (run.folder / "grids").iterdir()] == ["round-0000002.png"]
    assert Image.open(run.folder / "grids/round-0000002.png").size == (3 * 64, 4 * 64)  # 3 prompts; teacher, student at 1, 2, 4
    assert sorted(f.name for f in (run.folder / "checkpoints").iterdir()) == ["step-0000001", "step-0000002"]
    assert {f.name for f in tmp_path.iterdir()} == {"run", "cache"}
    assert load(run.folder / "config.yaml") == setup(rounds=2, save_every=1)
    assert json.loads((run.place / "state.json").read_text())["grid"] == list(run.study.grid)
    watched = {"student/grad_norm", "critic/grad_norm", "student/x0_std", "student/x0_max", "student/x0_drift"}
    watched |= {"critic/over_linear", "pictures/contrast", "pictures/saturation", "pictures/clipped", "pictures/shift"}
    assert watched <= {k for line in metrics(run.folder) for k, v in line.items() if math.isfinite(v)}
    assert run.sample(["a red circle"]).shape == (1, 64, 64, 3)


def test_a_folder_that_holds_something_is_left_alone(setup, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    api.train(setup(rounds=2), run)
    before = contents(run)
    with pytest.raises(ValueError, match="already holds a run; add --resume to go on with it, or name another folder with --out"):
        api.train(setup(rounds=2), run)
    with pytest.raises(
        ValueError, match="was made with another train.lr; resume with its own config.yaml, or name another --out"
    ):
        api.train(setup(rounds=2, lr=5e-3), run, resume=True)
    with pytest.raises(ValueError, match="was made with another data.images"):
        api.train(setup("consistency", rounds=2), run, resume=True)
    assert contents(run) == before
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds other files and no run|there is no run at"):
            api.train(setup(rounds=2), other, resume=resume)
    assert contents(other) == {"thesis.tex": b"years of work"}
    with pytest.raises(ValueError, match="there is no run at .*/nowhere to resume; leave --resume away"):
        api.train(setup(rounds=2), tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_how_long_a_run_is_may_change(setup, tmp_path):
    run = tmp_path / "run"
    api.train(setup(rounds=1), run)
    api.train(setup(rounds=2, save_every=7, log_every=2, preview_every=9), run, resume=True)
    assert checkpoint.latest(run / "checkpoints").name == "step-0000002"
    assert load(run / "config.yaml").train.rounds == 2
    assert api.train(setup(rounds=2), run, resume=True).place.name == "step-0000002"  # done already: nothing to do


def test_a_damaged_checkpoint_stops_a_resume_and_its_remedy_works(setup, tmp_path):
    run = tmp_path / "run"
    api.train(setup(rounds=2, save_every=1), run)
    whole = weights_of(run)
    file = checkpoint.latest(run / "checkpoints") / "critic.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="step-0000002 is damaged .* remove that folder to go on from the one before it"):
        api.train(setup(rounds=2, save_every=1), run, resume=True)
    for part in file.parent.iterdir():
        part.unlink()
    file.parent.rmdir()
    api.train(setup(rounds=2, save_every=1), run, resume=True)
    assert weights_of(run) == whole


def test_ctrl_c_in_a_terminal_says_how_to_go_on(setup, tmp_path):
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(setup(rounds=10**6, save_every=10**6).dump())
    command = [sys.executable, "-m", "fewstep", "train", str(config), "--set", "train.lr=0.002", "--out", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FEWSTEP_CACHE": str(tmp_path / "cache")}
    ran = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while ran.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
    ran.send_signal(signal.SIGINT)
    said, wrong = ran.communicate()
    assert ran.returncode == 130, wrong
    assert said.strip() == f"stopped; to go on: fewstep train {run / 'config.yaml'} --out {run} --resume"
    assert "Traceback" not in wrong
    done = metrics(run)[-1]["round"]
    assert checkpoint.latest(run / "checkpoints").name == f"step-{done:07d}"
    own = load(run / "config.yaml")
    assert own.train.lr == 0.002
    again = api.train(own.model_copy(update={"train": replace(own.train, rounds=done + 1)}), run, resume=True)
    assert again.place.name == f"step-{done + 1:07d}"


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_one_that_never_was(teacher, tmp_path, kills):
    command = [sys.executable, str(ROOT / "tests/kill.py"), teacher, str(tmp_path), str(kills), "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FEWSTEP_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads(ran.stdout)
    print(told)
    assert told["kills"] == kills and told["while saving"] > 0
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
