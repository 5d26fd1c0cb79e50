"""The loop: what it does with a bad update, an interruption, a kill; and that going on is as if nothing had happened."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import save, tiny_sd_pipeline
from torch import nn
from toys import ring

from fewstep import api, checkpoint
from fewstep.config import load, parse
from fewstep.data import Source
from fewstep.denoiser import Cond
from fewstep.monitor import Log, Meter
from fewstep.networks import Role
from fewstep.objectives import Losses, Needs, Objective, Turn
from fewstep.objectives.scm import SCM
from fewstep.trainer import Diverged, Job, Player, Settings, fit, make_accelerator

ROOT = Path(__file__).parents[1]


# A toy game of two linear maps, in which a test decides what every loss is.

SETTINGS = Settings(rounds=5, batch=4, lr=1e-2, warmup=1, ema=0.5, device="cpu", log_every=1, save_every=1, preview_every=1)
Fault = Callable[[torch.Tensor], torch.Tensor]
NAN: Fault = lambda loss: loss * float("nan")  # noqa: E731
INFINITE: Fault = lambda loss: loss + float("inf") * loss  # noqa: E731
STEEP: Fault = lambda loss: (loss - loss.detach()).sqrt()  # noqa: E731  (the value is 0, the gradient infinite)


@dataclass(frozen=True)
class Toy(Objective):
    at: Callable[[int, str], Fault | None] = lambda round_, player: None
    steps: int = 1
    sampler: str | None = None

    @property
    def needs(self) -> Needs:
        return Needs(roles=("critic",))

    def round(self, step):
        def turn(player):
            def loss(nets, batch, rng):
                each = nets[player](rng.normal(batch.shape)).square().mean(1)
                fault = self.at(step, player)
                return Losses({"loss": each if fault is None else fault(each)})

            return Turn(player, loss)

        return [turn("critic"), turn("student")]


def job(folder, at=lambda round_, player: None, preview=None, **settings):
    rows = Cond({"word": torch.zeros(4, 1)})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        roles = {n: Role(n, nn.Linear(2, 2), owns=True, dtype=torch.float32) for n in ("student", "critic")}
    source = Source(rows, rows[:1], None, ["a"] * 4, (2,))
    return Job(Toy(at), roles, dict, source, replace(SETTINGS, **settings), folder, {}, preview)


def watched(folder, **options):
    """What every round's checkpoint held: round -> (files, state)."""
    found = {}
    fit(
        job(
            folder,
            preview=lambda done, _: found.update({done: checkpoint.load(folder / f"checkpoints/step-{done:07d}")}),
            **options,
        )
    )
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "cpu_seconds", "peak_gb")} for line in lines]


@dataclass(frozen=True)
class Averaged(Objective):
    """The student moves; the average of it, which it asks for targets, is looked at."""

    seen: list
    steps: int = 1
    sampler: str | None = None

    @property
    def needs(self) -> Needs:
        return Needs(average=0.5)

    def round(self, step):
        def loss(nets, batch, rng):
            self.seen.append([p.detach().clone() for p in nets["average"].parameters()])
            return Losses({"loss": nets["student"](rng.normal(batch.shape)).square().mean(1)})

        return [Turn("student", loss)]


def averaged(folder, seen, **settings):
    base = job(folder, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        role = Role("average", nn.Linear(2, 2), owns=True, dtype=torch.float32)
    return replace(base, objective=Averaged(seen), roles={"student": base.roles["student"], "average": role})


def test_targets_come_from_a_moving_average_that_goes_on_after_a_resume(tmp_path):
    """theta_ <- d theta_ + (1 - d) theta, d = min(0.5, (1 + n) / (10 + n)); at first it is the student itself."""
    seen, rest = [], []
    start = [p.detach().clone() for p in averaged(tmp_path, []).roles["student"].weights().values()]
    fit(averaged(tmp_path / "whole", seen, save_every=1))
    assert len(seen) == 5 and all(torch.equal(a, b) for a, b in zip(seen[0], start, strict=True))
    first = [checkpoint.load(tmp_path / "whole" / "checkpoints" / "step-0000004")[0][name] for name in ("average", "student")]
    assert torch.equal(seen[4][0], first[0]["weight"]) and torch.equal(seen[4][1], first[0]["bias"])
    assert not torch.equal(first[0]["weight"], first[1]["weight"])
    fit(averaged(tmp_path / "parts", rest, rounds=3))
    fit(averaged(tmp_path / "parts", rest), resume=True)
    assert all(torch.equal(a, b) for x, y in zip(seen, rest, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("fault", [NAN, INFINITE, STEEP], ids=["nan", "infinite", "infinite gradient"])
@pytest.mark.parametrize("round_", [0, 2])
def test_a_non_finite_loss_skips_that_update_alone(tmp_path, fault, round_):
    found = watched(tmp_path, at=lambda r, player: fault if (r, player) == (round_, "critic") else None)
    states = {done: files for done, (files, _) in found.items()}
    bad = round_ + 1
    if round_:
        assert same(states[bad]["critic"], states[bad - 1]["critic"])
        assert same(states[bad]["optimizer-critic"], states[bad - 1]["optimizer-critic"])
    else:
        assert all(not v.any() for v in states[bad]["optimizer-critic"].values())
    for done in range(2, 6):
        assert not same(states[done]["student"], states[done - 1]["student"])
        assert (done == bad) == same(states[done]["critic"], states[done - 1]["critic"])
    assert all(v.isfinite().all() for files in states.values() for tensors in files.values() for v in tensors.values())
    assert found[5][1]["skipped"] == {"student": 0.0, "critic": 1.0}
    assert float(states[5]["optimizer-critic"]["weight:step"]) == 4
    assert [line["critic/skipped"] for line in metrics(tmp_path)] == [float(done >= bad) for done in range(1, 6)]


@dataclass(frozen=True)
class Led(Objective):
    """The toy game, in which the critic follows the student."""

    share: float
    inner: Toy = Toy()
    steps: int = 1
    sampler: str | None = None

    @property
    def needs(self):
        return self.inner.needs

    def round(self, step):
        critic, student = self.inner.round(step)
        return [critic, replace(student, followers={"critic": self.share})]


def test_a_follower_moves_when_its_leader_has_moved(tmp_path):
    def trained(share):
        folder = tmp_path / str(share)
        fit(replace(job(folder, rounds=1), objective=Led(share)))
        return checkpoint.load(folder / "checkpoints/step-0000001")[0]

    alone, half, copied = trained(0.0), trained(0.5), trained(1.0)
    assert same(copied["critic"], copied["student"]) and not same(alone["critic"], alone["student"])
    assert all(same(found["student"], alone["student"]) for found in (half, copied))
    for key, value in half["critic"].items():
        torch.testing.assert_close(value, (alone["critic"][key] + alone["student"][key]) / 2)


def test_a_skipped_update_is_as_if_its_turn_had_not_been(tmp_path):
    whole = watched(tmp_path / "a", at=lambda r, player: NAN if (r, player) == (4, "student") else None)
    short = watched(tmp_path / "b", rounds=4)
    assert same(whole[5][0]["student"], short[4][0]["student"])
    assert not same(whole[5][0]["critic"], short[4][0]["critic"])


@pytest.mark.parametrize("player", ["student", "critic"])
def test_ten_in_a_row_stop_the_run(tmp_path, player):
    with pytest.raises(
        Diverged, match=rf"the {player}'s gradient has not been finite for 10 updates in a row \(round 13\); start"
    ) as e:
        fit(job(tmp_path, at=lambda r, who: NAN if who == player and r >= 3 else None, rounds=100))
    assert isinstance(e.value, ValueError)  # the user's to mend: exit code 2


def test_bad_updates_with_good_ones_between_do_not_stop_it(tmp_path):
    fit(job(tmp_path, at=lambda r, player: NAN if r % 10 else None, rounds=35, save_every=35))
    assert metrics(tmp_path)[-1]["student/skipped"] == 31


def test_the_moments_and_the_count_survive_a_resume(tmp_path):
    bad = lambda r, player: NAN if r == 1 else None  # noqa: E731
    fit(job(tmp_path / "whole", at=bad, rounds=6))
    fit(job(tmp_path / "parts", at=bad, rounds=3))
    fit(job(tmp_path / "parts", at=bad, rounds=6), resume=True)
    (files, state), (others, theirs) = (checkpoint.load(tmp_path / n / "checkpoints/step-0000006") for n in ("whole", "parts"))
    assert state == theirs and all(same(files[name], others[name]) for name in files)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_log_weights_of_levels_are_learned_saved_and_go_on_bitwise(tmp_path):
    def trained(folder, rounds, **options):
        torch.manual_seed(0)
        objective = SCM(guidance=(1.0, 4.0), noise_share=0.3)
        world, rows = ring(objective), Cond({"word": torch.zeros(8, 1)})
        source = Source(rows, rows[:1], world.truth.draw(8).float(), ["a"] * 8, (2,))
        roles = {name: Role(name, net, owns=True, dtype=torch.float32) for name, net in world.players.items()}

        def nets(modules):
            student = replace(world.nets.student, net=modules["student"])
            return replace(world.nets, student=student, weighting=modules["weighting"])

        return checkpoint.load(
            fit(Job(objective, roles, nets, source, replace(SETTINGS, rounds=rounds), tmp_path / folder), **options)
        )

    (files, state), (early, _) = trained("whole", 4), trained("parts", 2)
    others, theirs = trained("parts", 4, resume=True)
    assert state == theirs and all(same(files[name], others[name]) for name in files)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert not any(same(files[name], early[name]) for name in ("weighting", "optimizer-weighting", "student"))


def test_a_checkpoint_of_other_roles_is_refused(tmp_path):
    fit(job(tmp_path, rounds=1))
    place = tmp_path / "checkpoints/step-0000001/state.json"
    place.write_text(place.read_text().replace('"critic"\n', '"judge"\n'))
    with pytest.raises(
        ValueError, match="holds the roles .*judge.*, this config trains .*critic.*; use the config it was made with"
    ):
        fit(job(tmp_path, rounds=2), resume=True)


# Learning rates and settings.


def test_the_rate_rises_linearly_then_stays():
    settings = Settings(lr=0.4, warmup=4, rounds=100)
    assert [settings.rate("student", r) for r in (0, 1, 3, 4, 99)] == pytest.approx([0.1, 0.2, 0.4, 0.4, 0.4])


def test_cosine_falls_to_zero_for_the_student_alone():
    settings = Settings(lr=0.4, warmup=1, rounds=100, schedule="cosine")
    assert settings.rate("student", 50) == pytest.approx(0.2)
    assert settings.rate("student", 99) == pytest.approx(0.2 * (1 + math.cos(math.pi * 0.99)))
    assert settings.rate("critic", 99) == 0.4


def test_the_critic_may_have_a_rate_of_its_own():
    settings = Settings(lr=0.4, critic_lr=0.8, warmup=0)
    assert (settings.rate("student", 0), settings.rate("critic", 0)) == (0.4, 0.8)


def test_an_update_is_made_at_the_rate(tmp_path):
    start = {n: r.net.weight.detach().clone() for n, r in job(tmp_path).roles.items()}
    fit(job(tmp_path, rounds=1, lr=0.4, critic_lr=0.2, warmup=4))
    files, _ = checkpoint.load(tmp_path / "checkpoints/step-0000001")
    # Adam's first step is as long as its rate.
    assert (files["student"]["weight"] - start["student"]).abs().numpy() == pytest.approx(0.1, rel=1e-3)
    assert (files["critic"]["weight"] - start["critic"]).abs().numpy() == pytest.approx(0.05, rel=1e-3)


def test_the_average_is_of_the_student(tmp_path):
    found = watched(tmp_path, ema=0.0)
    assert same(found[3][0]["ema"], found[3][0]["student"])
    found = watched(tmp_path / "averaged", ema=0.9)
    assert not same(found[3][0]["ema"], found[3][0]["student"])


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"batch": 0}, {"lr": 0.0}, {"critic_lr": -1.0}, {"save_every": 0}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=f"train.{next(iter(wrong))}|train.lr and train.critic_lr"):
        Settings(**wrong)


# What a run says.


def test_a_meter_gives_means_since_it_was_read():
    meter = Meter()
    for value in (1.0, 3.0):
        meter.add("a", torch.tensor(value))
    meter.add("b", torch.tensor(5.0, dtype=torch.bfloat16))
    assert meter.take(lambda x: x) == {"a": 2.0, "b": 5.0}
    assert meter.take(lambda x: x) == {}
    meter.add("a", torch.tensor(7.0))
    assert meter.take(lambda x: 2 * x) == {"a": 14.0}


def test_a_log_forgets_what_comes_after_the_checkpoint(tmp_path):
    log = Log(tmp_path, active=True)
    for round_ in (1, 2, 3):
        log.write({"round": round_, "x": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"round": 1')  # cut short by a kill
    log.forget_after(2)
    assert [line["round"] for line in metrics(tmp_path)] == [1, 2]
    Log(tmp_path / "silent", active=False).write({"round": 1})
    assert not (tmp_path / "silent").exists()


# Ctrl-C.


def test_ctrl_c_saves_at_the_end_of_the_round(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def press(round_, player):
        if (round_, player) == (2, "critic"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(job(tmp_path, at=press, save_every=100, log_every=100, preview_every=100))
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-0000003"
    assert metrics(tmp_path)[-1]["round"] == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_a_picture_is_drawn_saves_too(tmp_path):
    def press(done, weights):
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(job(tmp_path, preview=press, save_every=100))
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-0000003"


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def press(round_, player):
        if (round_, player) == (2, "critic"):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(job(tmp_path, at=press, save_every=100))
    assert checkpoint.latest(tmp_path / "checkpoints") is None


# Whole runs on a tiny teacher.


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save(tiny_sd_pipeline(), tmp_path_factory.mktemp("teacher") / "sd"))


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
