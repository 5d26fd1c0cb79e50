"""What every game of a critic and a student refuses before anything is loaded, and how its round goes."""

from dataclasses import replace

import pytest
import torch
from toys import NOTHING, SCHEDULES, TEACHERS, Gaussian, denoiser, endpoint, game, gaussian, ring

from fewstep.objectives import Batch
from fewstep.objectives.base import objectives
from fewstep.objectives.two_time_scale import TwoTimeScale
from fewstep.stream import stream

GAMES = sorted(name for name, kind in objectives().items() if issubclass(kind, TwoTimeScale))


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"low": 0.9, "high": 0.1}, "low < high"),
        ({"high": 1.5}, "low < high"),
        ({"critic_low": 1.0}, "low < high"),
        ({"critic_turns": 0}, "critic_turns"),
        ({"critic_turns": -1}, "critic_turns"),
        ({"ida": 1.2}, "ida"),
        ({"shift": 0.0}, "shift must be positive"),
    ],
)
def test_wrong_settings_are_refused_at_once(name: str, wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        objectives()[name](**wrong)


@pytest.mark.parametrize("name", GAMES)
def test_a_round_is_the_critics_turns_and_then_the_students(name: str) -> None:
    game = objectives()[name](critic_turns=3, ida=0.75)
    turns = game.round(0)
    assert [turn.player for turn in turns] == ["critic"] * 3 + ["student"]
    assert [dict(turn.followers) for turn in turns] == [{}] * 3 + [{"critic": 0.25}]
    assert {name for turn in turns for name in turn.movers} == {"student", *game.needs.roles}, "what is asked for is trained"


@pytest.mark.parametrize("name", [*GAMES, "phased_dmd"])
def test_a_shift_moves_both_players_times_towards_noise(name: str) -> None:
    """Where the critic is asked; k = 5 takes 0.5 to 5 / 6, and a half of all times above that."""
    kind = objectives()[name]
    for shift, middle in ((1.0, 0.5), (5.0, 5 / 6)):
        objective = kind(shift=shift, **({"phases": 1} if name == "phased_dmd" else {"steps": 1}))
        world, asked = ring(objective), []
        schedule = world.nets.student.schedule

        def note(net, x, time, cond, asked=asked, schedule=schedule):
            asked.append(schedule.t_of_model_time(time))
            return net(x, time, cond)

        critic = replace(world.nets.critic, call=note)
        nets = replace(world.nets, critic=critic, judge=replace(world.nets.judge, denoiser=critic) if world.nets.judge else None)
        for turn in objective.round(0)[-2:]:
            asked.clear()
            turn.loss(nets, world.batch(1024), stream(0, 0, 0, 0))
            assert float((asked[0] > middle).double().mean()) == pytest.approx(0.5, abs=0.06), turn.player


@pytest.mark.parametrize("schedule, target", TEACHERS)
@pytest.mark.parametrize("name", ["dmd", "rcm", "sid", "vsd"])
def test_an_exact_critic_of_a_normal_student_loses_what_the_monitors_hold_it_against(
    name: str, schedule: str, target: str
) -> None:
    mean, var, n = [0.4, -1.0], [0.25, 2.0], 100_000
    student = denoiser(Gaussian(mean, var, endpoint), SCHEDULES[schedule], target)
    critic = gaussian(mean, var, SCHEDULES[schedule], target)
    one = {"rollout_steps": 1} if name == "rcm" else {"steps": 1}
    with torch.no_grad():
        losses = objectives()[name](**one).critic_loss(game(student, critic, critic), Batch(NOTHING, (n, 2)), stream(0, 0, 0, 0))
    assert losses.total.item() == pytest.approx(losses.stats["denoise_linear"].item(), rel=0.02)
