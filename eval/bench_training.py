"""What training costs beyond its network passes: `python eval/bench_training.py [--teacher zoo:sprites-sd] [--out FILE.json]`.

For dmd with full and with LoRA roles: the time of a round over the sum of the bare passes it must make (measured side by side, in
alternation, because machines are noisy), host synchronisations a round, saved activation bytes of each turn, `fewstep --help`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import trainer
from fewstep.api import open_study
from fewstep.config import parse
from fewstep.costs import Passes, saved_bytes
from fewstep.data import open_source
from fewstep.evaluation.results import environment
from fewstep.objectives.base import Batch
from fewstep.stream import stream

BATCH = 32


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: a tensor read as a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Times live on the CPU by design and steer nothing on the device; what counts is a float32 result that is read.
        if "_local_scalar_dense" in str(func) and args[0].dtype == torch.float32:
            self.count += 1
        return func(*args, **(kwargs or {}))


def median_ms(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if i:
                times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def bench(path: str, weights: str, repeats: int) -> dict[str, Any]:
    """The numbers of one kind of roles."""
    role = {"weights": weights, "rank": 16}
    tree = {"teacher": {"path": path, "guidance": 3.0}, "student": role, "critic": role, "objective": {"name": "dmd"}}
    config = parse({**tree, "data": {"prompts": "zoo:sprites"}, "train": {"batch": BATCH}})
    study = open_study(config)
    source = open_source(study.teacher, prompts="zoo:sprites", images=None, images_needed=False, cache=None, progress=False)
    accelerator = trainer.make_accelerator(config.train)
    players = {n: trainer.Player(study.roles[n], config.train, accelerator, restarts=False) for n in ("student", "critic")}
    nets = study.nets({**study.roles, **{n: p.module for n, p in players.items()}})

    def turn(number: int, i: int, kind: Any, update: bool = True) -> None:
        rng = stream(0, 0, number, i)
        cond, shape, *_ = source.draw(BATCH, rng.child("data"))
        for name, player in players.items():
            player.role.requires_grad_(name == kind.player)
        losses = kind.loss(nets, Batch(cond, shape), rng)
        if update:
            losses.total.backward()
            players[kind.player].update(1e-5, 1.0)

    def one_round(number: int = 0) -> None:
        for i, kind in enumerate(config.objective.round(number)):
            turn(number, i, kind)

    one_round()
    with Waits() as waits, Passes(study.roles) as counted:
        one_round()
    made = {(name, rows, graph): times for (name, graph, rows), times in counted.made.items()}
    kinds = {t.player: t for t in config.objective.round(0)}
    saved = {}
    for name, kind in kinds.items():
        saved[name] = saved_bytes(lambda kind=kind: turn(0, 0, kind, update=False))
    cond, shape, *_ = source.draw(2 * BATCH, stream(0, 0, 0, 0))
    x, t = torch.randn(shape), torch.full((2 * BATCH,), 0.5, dtype=torch.float64)

    def bare(name: str, n: int, grad: bool) -> None:
        study.roles[name].requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            time_ = study.teacher.schedule.model_time(t[:n]).float()
            out = study.teacher.family.call(study.roles[name], x[:n], time_, cond[:n])
            if grad:
                out.sum().backward()

    passes: dict[str, Callable[[], Any]] = {f"{n} {b} {g}": (lambda n=n, b=b, g=g: bare(n, b, g)) for n, b, g in made}
    ms = median_ms({"round": one_round, **passes}, repeats)
    total = sum(ms[f"{n} {b} {g}"] * count for (n, b, g), count in made.items())
    return {
        "roles": weights,
        "passes": {f"{n}, batch {b}, {'with' if g else 'no'} gradient": c for (n, b, g), c in made.items()},
        "round_ms": round(ms["round"], 1),
        "bare_passes_ms": round(total, 1),
        "ratio": round(ms["round"] / total, 3),
        "host_waits_a_round": waits.count,
        "saved_activation_bytes": saved,
    }


def help_seconds() -> float:
    """The best of five runs of `fewstep --help`."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fewstep", "--help"], check=True, capture_output=True, cwd=tempfile.gettempdir())
        times.append(time.perf_counter() - began)
    return round(min(times), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="zoo:sprites-sd")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("eval/results/bench_training.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "teacher": args.teacher,
        "batch": BATCH,
        "dmd": [bench(args.teacher, weights, args.repeats) for weights in ("full", "lora")],
        "help_seconds": help_seconds(),
        "environment": environment(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
