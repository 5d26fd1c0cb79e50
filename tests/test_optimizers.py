"""Optimizers that remember less: the forecast counts what they remember, a bad update moves nothing, a run goes on as it was."""

import sys
from types import ModuleType

import pytest
import torch
from test_trainer import NAN, job, same, watched
from torch import nn

from fewstep import api, checkpoint, walks
from fewstep.config import parse
from fewstep.optimizers import KINDS, check_optimizer, step_unless
from fewstep.trainer import fit

BETAS = (0.9, 0.999)


class EightBit(torch.optim.Optimizer):
    """Stands in for bitsandbytes' AdamW8bit: its arguments, its kinds of state (bytes, scales, a plain count of steps)."""

    def __init__(self, params, lr=1e-3, betas=BETAS, eps=1e-8, weight_decay=1e-2):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, state1=torch.zeros(p.shape, dtype=torch.uint8), absmax1=torch.zeros(1))
                assert type(state["step"]) is int
                state["step"] += 1
                state["absmax1"].add_(p.grad.abs().max())
                p.data.add_(p.grad / state["absmax1"], alpha=-group["lr"])


@pytest.fixture
def bitsandbytes(monkeypatch):
    package, optim = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    optim.AdamW8bit = EightBit
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    monkeypatch.setattr("fewstep.optimizers.check_optimizer", lambda name, cpu: None)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("shape", [(6, 4), (5,), (3, 2, 3, 3)], ids=str)
def test_an_optimizer_remembers_what_the_forecast_counts(name, shape):
    p = nn.Parameter(torch.randn(shape))
    optimizer = KINDS[name].make([p], 1e-3, BETAS, 0.0)
    p.grad = torch.randn_like(p)
    optimizer.step()
    held = sum(v.numel() * v.element_size() for v in optimizer.state[p].values() if torch.is_tensor(v))
    assert held == KINDS[name].remembers(p.shape)


def test_eight_bits_and_factors_are_less_than_moments():
    adamw, eight, factored = (KINDS[k].remembers(torch.Size((1024, 1024))) for k in ("adamw", "adamw8bit", "adafactor"))
    assert 3.9 < adamw / eight < 4 and adamw / factored > 900


@pytest.mark.parametrize("name", KINDS)
def test_a_bad_update_moves_nothing(name, bitsandbytes):
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = KINDS[name].make([p], 0.1, BETAS, 0.0)
    p.grad = torch.ones_like(p)
    step_unless(torch.tensor(1.0), optimizer, optimizer)
    assert torch.equal(p, torch.ones(2, 2))
    step_unless(torch.tensor(0.0), optimizer, optimizer)
    assert (p < 1).all()


@pytest.mark.parametrize("name", ["adamw8bit", "adafactor"])
def test_a_run_goes_on_to_the_bit_and_counts_what_it_skips(name, tmp_path, bitsandbytes):
    def at(round_, player):
        return NAN if (round_, player) == (1, "student") else None

    whole = watched(tmp_path / "whole", at=at, optimizer=name)
    assert whole[2][1]["skipped"] == {"student": 1.0, "critic": 0.0}
    assert same(whole[1][0]["student"], whole[2][0]["student"]) and not same(whole[2][0]["student"], whole[3][0]["student"])
    fit(job(tmp_path / "parts", at=at, optimizer=name, rounds=3))
    place = fit(job(tmp_path / "parts", at=at, optimizer=name), resume=True)
    files, wanted = checkpoint.load(place)[0], whole[5][0]
    assert all(same(files[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"train": {"optimizer": "adamw8bit"}}, r"needs bitsandbytes \(pip install bitsandbytes\); or set it to adafactor"),
        ({"teacher": {"path": "zoo:sprites-sd", "storage": "host"}}, "storage: host is for a GPU .*; on the CPU leave it away"),
        ({"train": {"device": "cuda"}}, "set train.device to cpu or auto"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU cannot do")
def test_what_cannot_work_here_is_refused_in_a_sentence_before_anything_is_loaded(wrong, said, tmp_path, monkeypatch):
    monkeypatch.setattr(walks, "load_teacher", lambda *_, **__: pytest.fail("a teacher was loaded"))
    tree = {"teacher": {"path": "zoo:sprites-sd"}, "objective": {"name": "dmd"}, "data": {"prompts": "zoo:sprites"}}
    with pytest.raises(ValueError, match=said) as refusal:
        api.train(parse(tree | wrong), tmp_path / "run")
    assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


def test_eight_bits_are_for_cuda(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ValueError, match="adamw8bit runs on CUDA devices alone; on the CPU set it to adafactor or adamw"):
        check_optimizer("adamw8bit", cpu=True)
    check_optimizer("adamw8bit", cpu=False)
    check_optimizer("adafactor", cpu=True)
