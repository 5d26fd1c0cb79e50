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
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faulty import SETTINGS, metrics, same
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import fewstep
from fewstep import api, checkpoint, judging, proof
from fewstep.config import load, parse
from fewstep.evaluation import results
from fewstep.exported import Exported
from fewstep.networks import Role
from fewstep.preview import Preview
from fewstep.trainer import Player, make_accelerator

ROOT = Path(__file__).parents[1]
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


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
    monkeypatch.setattr(Preview, "__call__", lambda *_: None)

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


def test_as_many_checkpoints_are_kept_as_are_asked_for_and_each_is_a_run_of_its_round(setup, tmp_path):
    run = tmp_path / "run"
    api.train(setup(rounds=3, save_every=1, keep=2), run)
    names = lambda: sorted(f.name for f in (run / "checkpoints").iterdir())  # noqa: E731
    assert names() == ["step-0000002", "step-0000003"]
    last = api.train(setup(rounds=5, save_every=1, keep=3), run, resume=True)
    assert names() == ["step-0000003", "step-0000004", "step-0000005"]
    place = run / "checkpoints" / "step-0000003"
    third = api.Run(place)
    assert third.config == last.config and third.place == place and last.place.name == "step-0000005"
    unfinished = place.with_name(".writing-77")
    shutil.copytree(place, unfinished)
    with pytest.raises(ValueError, match="writing-77 is not a run folder"):
        api.Run(unfinished)
    stored = checkpoint.load(place)[0]["ema"]
    assert all(torch.equal(w, stored[k]) for k, w in third.weights.items())
    assert any((w != stored[k]).any() for k, w in last.weights.items())
    assert (third.sample(["a red circle"]) != last.sample(["a red circle"])).any()
    assert json.loads((third.export(tmp_path / "third") / "fewstep.json").read_text())["record"]["round"] == 3


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


def test_a_run_goes_on_with_its_own_data_alone(setup, data, tmp_path):
    run, prompts = tmp_path / "run", Path(data["dmd"]["prompts"])
    api.train(setup(rounds=1), run)
    before, text = contents(run), prompts.read_text()
    for other in (text + "a triangle\n", "".join(sorted(text.splitlines(True))[::-1])):  # one more, and other places
        prompts.write_text(other)
        try:
            with pytest.raises(
                ValueError, match="the data have changed since .*step-0000001 was written; put back what they were"
            ):
                api.train(setup(rounds=2), run, resume=True)
        finally:
            prompts.write_text(text)
        assert contents(run) == before
    api.train(setup(rounds=2), run, resume=True)
    place = checkpoint.latest(run / "checkpoints")
    state = json.loads((place / "state.json").read_text())
    del state["data"]  # as runs from before it was kept
    (place / "state.json").write_text(json.dumps(state))
    assert api.train(setup(rounds=3), run, resume=True).place.name == "step-0000003"


@pytest.mark.parametrize("name", ["0.txt", "0.png"])
def test_captions_and_pictures_are_data_too(setup, data, tmp_path, name):
    run, file = tmp_path / "run", Path(data["consistency"]["images"]) / name
    api.train(setup("consistency", rounds=1), run)
    before, other = file.read_bytes(), file.with_stem("1").read_bytes()
    file.write_bytes(other)
    try:
        with pytest.raises(ValueError, match="the data have changed"):
            api.train(setup("consistency", rounds=2), run, resume=True)
    finally:
        file.write_bytes(before)
    api.train(setup("consistency", rounds=2), run, resume=True)


def moved(config, part, **places):
    return config.model_copy(update={part: getattr(config, part).model_copy(update={k: str(v) for k, v in places.items()})})


@pytest.mark.parametrize("objective", ["dmd", "consistency"])
def test_a_run_goes_on_with_its_data_elsewhere_where_they_are_the_same(setup, data, tmp_path, objective):
    run, (key, place) = tmp_path / "run", *data[objective].items()
    api.train(setup(objective, rounds=1), run)
    before, there = contents(run), tmp_path / "there" / Path(place).name
    (shutil.copytree if Path(place).is_dir() else shutil.copy)(place, (there.parent.mkdir(), there)[1])
    other = next(there.glob("1.txt"), there)
    text = other.read_text()
    other.write_text(text.replace("1", "one").replace("red", "green"))
    with pytest.raises(ValueError, match="the data have changed since .*step-0000001 was written; put back what they were"):
        api.train(moved(setup(objective, rounds=2), "data", **{key: there}), run, resume=True)
    assert contents(run) == before
    other.write_text(text)
    api.train(moved(setup(objective, rounds=2), "data", **{key: there}), run, resume=True)
    assert getattr(load(run / "config.yaml").data, key) == str(there)
    api.train(setup(objective, rounds=2), tmp_path / "whole")
    assert same(*(load_file(api.Run(folder).place / "student.safetensors") for folder in (run, tmp_path / "whole")))


def reseeded(folder):
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({k: v + 1e-3 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


def rescheduled(folder):
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.02}))


def test_a_run_goes_on_with_its_teacher_elsewhere_where_it_is_the_same(setup, teacher, tmp_path):
    run = tmp_path / "run"
    api.train(setup(rounds=1), run)
    before = contents(run)
    for change in (reseeded, rescheduled):
        change(shutil.copytree(teacher, other := tmp_path / change.__name__))
        said = f"the teacher at {other} is not the one that .*step-0000001 was taught by, which was at {teacher}; name that"
        with pytest.raises(ValueError, match=said):
            api.train(moved(setup(rounds=2), "teacher", path=other), run, resume=True)
        assert contents(run) == before
    there = shutil.copytree(teacher, tmp_path / "there")
    api.train(moved(setup(rounds=2), "teacher", path=there), run, resume=True)
    assert load(run / "config.yaml").teacher.path == str(there)
    api.train(setup(rounds=2), tmp_path / "whole")
    assert same(*(load_file(api.Run(folder).place / "student.safetensors") for folder in (run, tmp_path / "whole")))


@pytest.mark.parametrize(("part", "key", "kept"), [("teacher", "path", "teacher"), ("data", "prompts", "data")])
def test_what_a_checkpoint_does_not_know_may_not_move(setup, tmp_path, part, key, kept):
    run = tmp_path / "run"
    state = api.train(setup(rounds=1), run).place / "state.json"
    state.write_text(json.dumps({k: v for k, v in json.loads(state.read_text()).items() if k != kept}))
    with pytest.raises(ValueError, match=f"was made with another {part}.{key}; resume with its own config.yaml"):
        api.train(moved(setup(rounds=2), part, **{key: tmp_path / "there"}), run, resume=True)
    assert api.train(setup(rounds=2), run, resume=True).place.name == "step-0000002"


def test_a_checkpoint_says_what_wrote_it(setup, tmp_path):
    state = json.loads((api.train(setup(rounds=1), tmp_path / "run").place / "state.json").read_text())
    assert state["versions"].keys() == {"fewstep", "torch", "diffusers"}
    assert torch.__version__.startswith(state["versions"]["torch"])
    asked = subprocess.run(["git", "-C", ROOT, "cat-file", "-t", str(state["git"]).rstrip("+")], capture_output=True, text=True)
    assert asked.stdout.strip() == "commit" if (ROOT / ".git").exists() else state["git"] is None


@pytest.mark.parametrize("backend", ["xformers", "flash"])
def test_an_attention_that_is_not_here_is_refused_before_anything_is_written(setup, tmp_path, backend):
    if util.find_spec({"xformers": "xformers", "flash": "flash_attn"}[backend]):
        pytest.skip(f"{backend} is here")
    with pytest.raises(ValueError, match=f"train.attention: {backend} does not work here .*; sdpa always does"):
        api.train(setup(rounds=1, attention=backend), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_in_bfloat16_a_run_trains_goes_on_and_is_exported(setup, tmp_path, device):
    chosen = {"dtype": "bfloat16", "device": device, "save_every": 1}
    api.train(setup(rounds=1, **chosen), tmp_path / "run")
    run = api.train(setup(rounds=3, **chosen), tmp_path / "run", resume=True)
    files, state = checkpoint.load(run.place)
    assert state["skipped"] == {"student": 0.0, "critic": 0.0}
    assert {v.dtype for v in files["ema"].values()} == {torch.float32}
    assert any(v.abs().max() > 0 for k, v in files["ema"].items() if "lora_B" in k)
    out = run.export(tmp_path / "out")
    assert not [c for c in proof.prove(out, run.config.teacher.path, tmp_path) if not c["ok"]]
    assert run.sample(["a star"]).shape == (1, 64, 64, 3)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_not_the_trained_ones(setup, tmp_path, steps):
    run = api.train(setup(rounds=1), tmp_path / "run")
    for sample in (run.sample, run.sample_teacher):
        with pytest.raises(ValueError, match=f"nothing can be drawn in {steps} steps; give at least 1"):
            sample(["a star"], steps=steps)


def test_a_string_is_one_prompt_and_any_iterable_is_several(setup, tmp_path):
    run = api.train(setup(rounds=1), tmp_path / "run")
    for sample in (run.sample, run.sample_teacher, Exported(run.export(tmp_path / "out")).sample):
        assert np.array_equal(sample("a star", 1), sample(["a star"], 1))
        assert np.array_equal(sample((word for word in ("a star", "a cross")), 1), sample(["a star", "a cross"], 1))
        with pytest.raises(ValueError, match="there is no prompt to draw; give at least one"):
            sample([], 1)


def test_the_python_api_goes_from_a_teacher_to_a_proof(setup, teacher, data, tmp_path, monkeypatch):
    """`setup` is here for its cache."""
    asked = []
    monkeypatch.setattr(judging, "evaluate", lambda *given, **named: (asked.append((given, named)), ({"rows": []}, Path()))[1])
    run = fewstep.distill(
        teacher={"path": Path(teacher), "guidance": 2},
        objective={"name": "dmd", "critic_turns": 1},
        data=Path(data["dmd"]["prompts"]),
        steps=2,
        out=tmp_path / "run",
        student={"weights": "lora", "rank": 2},
        critic={"weights": "lora", "rank": 2},
        train={"rounds": 1, "batch": 1, "device": "cpu"},
    )
    assert isinstance(run, fewstep.Run) and (run.config.objective.steps, run.config.teacher.guidance) == (2, 2.0)
    assert run.config.data.prompts == data["dmd"]["prompts"]
    report = run.verify()
    assert report.ok and (tmp_path / "run/export/fewstep.json").exists(), str(report)
    assert run.evaluate("sprites-quick", [2], teacher=False, n=9) == {"rows": []}
    given = {"reference": None, "prompts": None, "n": 9, "size": None}
    asked_for = {"out": None, "steps": [2], "fresh": False, "teacher": False, "given": given}
    assert asked == [((run.folder, "sprites-quick"), asked_for)]


def test_a_card_shows_what_was_measured_of_its_own_round_alone(setup, tmp_path):
    run = api.train(setup(rounds=1), tmp_path / "run")
    found = results.new([{"model": "student", "steps": 2, "fd": 1.25}], {"name": "mine", "hash": "a"})
    found["environment"]["round"] = 1
    results.write(tmp_path / "run/results.json", found)
    assert "| student | 2 | 1.25 |" in (run.export(tmp_path / "out") / "README.md").read_text()
    on = api.train(setup(rounds=2), tmp_path / "run", resume=True)
    with pytest.warns(UserWarning, match="results.json was measured at round 1, not at round 2, and is left out of the card"):
        card = (on.export(tmp_path / "out") / "README.md").read_text()
    assert "Measured" not in card and "round: 2" in card


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_the_command_says_how_to_go_on(setup, tmp_path, number):
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(setup(rounds=10**6, save_every=10**6).dump())
    command = [sys.executable, "-m", "fewstep", "train", str(config), "--set", "train.lr=0.002", "--out", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FEWSTEP_CACHE": str(tmp_path / "cache")}
    ran = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while ran.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
    ran.send_signal(number)
    said, wrong = ran.communicate()
    assert ran.returncode == 130, wrong
    assert said.strip() == f"stopped; to go on: fewstep train {run / 'config.yaml'} --out {run} --resume"
    assert "stopping after this round; again to stop at once\n" in wrong and "Traceback" not in wrong
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


def placed(pipe):
    return {part.device.type for part in pipe.components.values() if isinstance(part, torch.nn.Module)}


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_whoever_encodes_and_draws_is_where_the_run_is(name, folders, setup, monkeypatch):
    """Text encoders and autoencoder, too: SD3's transformer comes first, and the pipeline takes its device for all."""
    config = setup()
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"path": str(folders[name])})})
    monkeypatch.setattr(api, "make_accelerator", lambda *_, **__: SimpleNamespace(device=torch.device("meta")))

    def look(teacher, **_):
        assert placed(teacher.pipe) == {"meta"} and teacher.pipe.device.type == "meta"
        raise InterruptedError

    monkeypatch.setattr(api, "open_source", look)
    with pytest.raises(InterruptedError):
        api.train(config, Path(os.environ["FEWSTEP_CACHE"]) / "run")


@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_a_run_draws_on_the_gpu_where_there_is_one_and_none_was_refused(asked, setup, tmp_path, monkeypatch):
    run = api.train(setup(rounds=1, device=asked), tmp_path / "run")
    monkeypatch.setattr(api, "default_device", lambda: "meta")
    assert placed(api.Run(run.folder).study.teacher.pipe) == {"meta" if asked == "auto" else "cpu"}
