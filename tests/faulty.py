"""A toy game of two linear maps, in which a test decides what every loss is."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from fewstep import checkpoint
from fewstep.data import Source
from fewstep.denoiser import Cond
from fewstep.networks import Role
from fewstep.objectives import Losses, Needs, Objective, Turn
from fewstep.trainer import Job, Settings, fit

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
