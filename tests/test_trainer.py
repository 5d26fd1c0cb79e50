"""The loop: what it does with a bad update, an interruption, a kill; and that going on is as if nothing had happened."""

import math
import os
import signal
from dataclasses import dataclass, field, replace

import pytest
import torch
from faulty import INFINITE, NAN, SETTINGS, STEEP, Toy, job, metrics, same, watched
from torch import nn
from toys import ring

from fewstep import checkpoint, stopping
from fewstep.data import Source
from fewstep.denoiser import Cond
from fewstep.monitor import Log, Meter
from fewstep.networks import Role
from fewstep.objectives import Losses, Needs, Objective, Turn
from fewstep.objectives.scm import SCM
from fewstep.trainer import Diverged, Job, Settings, fit


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
    inner: Toy = field(default_factory=Toy)
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


@dataclass(frozen=True)
class Watching(Toy):
    """A toy that notes, in its loss and in its backward pass, whether fused attention may be used."""

    seen: list = field(default_factory=list)

    def round(self, step):
        def loss(nets, batch, rng):
            value = nets["student"](rng.normal(batch.shape)).square().mean(1)
            value.register_hook(lambda _: self.seen.append(torch.backends.cuda.flash_sdp_enabled()))
            self.seen.append(torch.backends.cuda.flash_sdp_enabled())
            return Losses({"loss": value})

        return [Turn("student", loss)]


@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_math_attention_has_no_fused_kernel_forward_or_backward_and_none_is_missing_after(tmp_path, attention):
    one = Watching()
    fit(replace(job(tmp_path, rounds=1, attention=attention), objective=one))
    assert one.seen == [attention == "sdpa"] * 2 and torch.backends.cuda.flash_sdp_enabled()


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


# Ctrl-C, and SIGTERM, which is the same from elsewhere.

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


@pytest.fixture(autouse=True)
def alive():
    """A signal that nobody handles fails its test, and ends no others."""
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM was not handled"))
    yield
    signal.signal(signal.SIGTERM, before)


@SIGNALS
def test_a_signal_saves_at_the_end_of_the_round_and_says_so_at_once(tmp_path, capsys, number):
    handlers, said = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], []

    def press(round_, player):
        if (round_, player) == (2, "critic"):
            os.kill(os.getpid(), number)
            said.append(capsys.readouterr().err)

    with pytest.raises(KeyboardInterrupt):
        fit(job(tmp_path, at=press, save_every=100, log_every=100, preview_every=100))
    assert said[0].endswith("stopping after this round; again to stop at once\n")
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-0000003"
    assert metrics(tmp_path)[-1]["round"] == 3
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_where_nothing_can_be_said_saves_all_the_same(tmp_path, monkeypatch):
    def broken(text):
        raise BrokenPipeError

    def press(round_, player):
        if (round_, player) == (2, "critic"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(stopping, "say", broken)
    with pytest.raises(KeyboardInterrupt):
        fit(job(tmp_path, at=press, save_every=100))
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-0000003"


def test_ctrl_c_while_a_picture_is_drawn_saves_too(tmp_path):
    def press(done, weights):
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(job(tmp_path, preview=press, save_every=100))
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-0000003"


@SIGNALS
def test_a_second_signal_stops_at_once(tmp_path, number):
    def press(round_, player):
        if (round_, player) == (2, "critic"):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        fit(job(tmp_path, at=press, save_every=100))
    assert checkpoint.latest(tmp_path / "checkpoints") is None
