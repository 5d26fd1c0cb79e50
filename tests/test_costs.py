"""What a turn costs, counted on real networks: passes of each, and the bytes that autograd keeps until backward."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import save, tiny_sd_pipeline
from torch import nn

from fewstep.api import open_study
from fewstep.config import parse
from fewstep.costs import Passes, forget_peak, peak_gb, saved_bytes
from fewstep.objectives import Batch
from fewstep.stream import stream

B, SHAPE = 3, (4, 8, 8)
ONE_X = B * 4 * 8 * 8 * 4  # bytes of a float32 batch

ROLES = {"full": {"weights": "full"}, "lora": {"weights": "lora", "rank": 2}}
kinds = pytest.mark.parametrize("kind", ROLES)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(objective's part of a config, kind of roles) -> a study of it on a tiny guided teacher."""
    teacher = str(save(tiny_sd_pipeline(), tmp_path_factory.mktemp("teacher") / "sd"))

    def make(objective, kind):
        images = objective["name"] not in ("dmd", "sid")
        tree = {"teacher": {"path": teacher, "guidance": 3.0}, "student": ROLES[kind], "critic": ROLES[kind]}
        return open_study(parse({**tree, "objective": objective, "data": {"images" if images else "prompts": "nowhere"}}))

    return make


def turns(study):
    """[(player, call of its loss)] of round 0, each with the players' gradients as the trainer sets them."""
    nets, objective = study.nets(study.roles), study.config.objective
    cond = study.teacher.encode(["a red circle"] * B)
    latents = torch.randn(B, *SHAPE, generator=torch.Generator().manual_seed(0))

    def call(i, turn):
        for name, role in study.roles.items():
            role.requires_grad_(name in turn.movers)
        return turn.loss(nets, Batch(cond, (B, *SHAPE), latents), stream(0, 0, 0, i))

    return [(turn.player, lambda i=i, turn=turn: call(i, turn)) for i, turn in enumerate(objective.round(0))]


def passes(study):
    """What each turn of a round runs: [(player, {(network, graph kept, rows): times})]."""
    found = []
    for player, call in turns(study):
        with Passes({k: v for k, v in study.roles.items() if k != "heads"}) as counted:
            call()
        found.append((player, dict(counted.made)))
    return found


STUDENT_OF_DMD = {("student", True, B): 1, ("critic", False, B): 1, ("teacher", False, 2 * B): 1}
CRITIC_OF_DMD = {("student", False, B): 1, ("critic", True, B): 1}


@kinds
def test_dmd_makes_the_passes_it_must_and_no_others(opened, kind):
    """Student: itself once with a graph, the critic once and the guided teacher once, as one batch, without."""
    study = opened({"name": "dmd", "steps": 1, "critic_turns": 2}, kind)
    assert passes(study) == [("critic", CRITIC_OF_DMD)] * 2 + [("student", STUDENT_OF_DMD)]


@kinds
def test_consistency_makes_the_passes_it_must_and_no_others(opened, kind):
    study = opened({"name": "consistency", "steps": 2, "solver_steps": 4}, kind)
    assert passes(study) == [("student", {("student", True, B): 1, ("student", False, B): 1, ("teacher", False, 2 * B): 1})]


@kinds
def test_with_heads_the_critics_pass_serves_its_score_and_its_features(opened, kind):
    """Beside dmd's own, only what is new is passed: real data in the critic's turn."""
    study = opened({"name": "adversarial", "inner": {"name": "dmd", "steps": 1, "critic_turns": 1}}, kind)
    (critic, seen), (student, judged) = passes(study)
    assert (critic, student) == ("critic", "student")
    assert seen == {("student", False, B): 1, ("critic", True, B): 2}
    assert judged == {("student", True, B): 1, ("critic", True, B): 1, ("teacher", False, 2 * B): 1}


@kinds
def test_a_ratio_comes_from_the_pass_that_gives_the_score(opened, kind):
    """f_distill's student: the critic once, with a graph for its features; a fresh pass only for what it learns from."""
    study = opened({"name": "f_distill", "steps": 1, "critic_turns": 1}, kind)
    (_, learned), (_, judged) = passes(study)
    assert judged == {("student", True, B): 1, ("critic", True, B): 1, ("teacher", False, 2 * B): 1}
    assert learned == {("student", False, B): 1, ("critic", True, B): 1, ("critic", True, 2 * B): 1}


# What the student's sample passes through on its way to the loss, beside the student.
BEYOND = {
    "dmd": ({"steps": 2}, lambda nets, *sample: None),
    "consistency": ({"steps": 2}, lambda nets, *sample: None),
    "adversarial": ({"inner": {"name": "dmd", "steps": 2}}, lambda nets, *sample: nets.judge.logits(*sample)),
    "sid": ({"steps": 2}, lambda nets, *sample: (nets.teacher(*sample), nets.critic(*sample))),
}


@kinds
@pytest.mark.parametrize("name", BEYOND)
def test_a_students_turn_keeps_no_more_than_the_passes_do_that_have_a_graph(opened, kind, name):
    """Its own; the critic's up to the tap, and the heads, where those judge; all of teacher and critic for SiD. Networks asked
    without a graph leave nothing behind: what remains is arithmetic on a few latents."""
    options, beyond = BEYOND[name]
    study = opened({"name": name, **options}, kind)
    nets, cond = study.nets(study.roles), study.teacher.encode(["a red circle"] * B)
    _, turn = turns(study)[-1]
    for role_name, role in study.roles.items():
        role.requires_grad_(role_name == "student")
    x, t = torch.randn(B, *SHAPE), torch.full((B,), 0.5, dtype=torch.float64)
    student = saved_bytes(lambda: nets.student(x, t, cond))
    bare = saved_bytes(lambda: beyond(nets, nets.student(x, t, cond).x0, t, cond))
    assert student > 100 * ONE_X and bare >= student + 100 * ONE_X * (name in ("adversarial", "sid"))
    assert name != "adversarial" or bare - student < student / 2  # the critic's pass ends halfway
    assert bare <= saved_bytes(turn) < bare + 12 * ONE_X


@kinds
def test_a_critics_turn_keeps_no_more_than_its_one_pass_does(opened, kind):
    study = opened({"name": "dmd", "steps": 2}, kind)
    nets, cond = study.nets(study.roles), study.teacher.encode(["a red circle"] * B)
    _, turn = turns(study)[0]
    for role_name, role in study.roles.items():
        role.requires_grad_(role_name == "critic")
    x, t = torch.randn(B, *SHAPE), torch.full((B,), 0.5, dtype=torch.float64)
    bare = saved_bytes(lambda: nets.critic(x, t, cond))
    assert bare <= saved_bytes(turn) < bare + 12 * ONE_X


# The instruments themselves.


def test_saved_bytes_are_the_activations_that_backward_needs():
    x = torch.zeros(10, requires_grad=True)
    assert saved_bytes(lambda: x + 1) == 0
    assert saved_bytes(lambda: x.exp()) == 40  # its own result
    assert saved_bytes(lambda: x.exp().sin()) == 40  # which both of them keep, once
    assert saved_bytes(lambda: (x.exp() + 1).sin()) == 80
    assert saved_bytes(lambda: x * x) == 0  # leaves are there anyway
    with torch.no_grad():
        assert saved_bytes(lambda: x.exp()) == 0


def test_passes_are_counted_by_rows_and_by_graph_while_it_is_entered():
    net = nn.Linear(2, 2)
    with Passes({"net": net}) as counted:
        net(torch.zeros(4, 2))
        with torch.no_grad():
            net(torch.zeros(8, 2))
    net(torch.zeros(4, 2))
    assert counted.made == Counter({("net", True, 4): 1, ("net", False, 8): 1})
    assert counted.take(4, 1) == {"passes/net": 3.0, "passes/net_backward": 1.0}
    assert counted.take(4, 1) == {"passes/net": 0.0}
    net.requires_grad_(False)
    with counted:
        net(torch.zeros(4, 2))
        net(torch.zeros(4, 2, requires_grad=True))
    assert counted.take(4, 2) == {"passes/net": 1.0, "passes/net_backward": 0.5}


def test_memory_is_that_of_this_process():
    assert 0.05 < peak_gb() < 1000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_a_peak_is_forgotten_when_a_run_begins():
    forget_peak()
    before = peak_gb()
    held = torch.ones(100_000_000)
    del held
    assert peak_gb() > before + 0.35
    forget_peak()
    assert peak_gb() < before + 0.2


def test_the_benchmark_of_training_runs_and_finds_no_wait_for_the_device(tmp_path, monkeypatch):
    place = Path(__file__).parents[1] / "eval" / "bench_training.py"
    spec = importlib.util.spec_from_file_location("bench_training", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BATCH", 4)
    found = module.bench(str(save(tiny_sd_pipeline(), tmp_path / "sd")), "lora", 1)
    assert found["passes"] == {
        **{f"student, batch {n}, no gradient": 6 for n in (3, 2, 1)},  # of the steps before those that are taught
        "student, batch 4, no gradient": 5,
        "student, batch 4, with gradient": 1,
        "critic, batch 4, with gradient": 5,
        "critic, batch 4, no gradient": 1,
        "teacher, batch 8, no gradient": 1,
    }
    assert found["host_waits_a_round"] == 0 and found["ratio"] > 0
