"""What training costs beyond its network passes, on the CPU: `python eval/bench_training.py [--teacher NAME] [--out FILE.json]`.

For dmd with full and with LoRA roles: the time of a round of `fit` over the sum of the bare passes it must make (side by side,
in alternation, because machines are noisy), host synchronisations a round, saved activation bytes of each turn, `fewstep --help`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.config import parse
from fewstep.costs import Passes, saved_bytes
from fewstep.data import Buckets, Source, open_source
from fewstep.evaluation.results import environment
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Turn
from fewstep.stream import Stream, stream
from fewstep.study import Study, open_study
from fewstep.trainer import Job, fit

BATCH = 32
Kind = tuple[str, bool, int]  # of a pass: the network, whether a backward follows, rows


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


def _since(began: float) -> float:
    """Milliseconds since then."""
    return 1000 * (time.perf_counter() - began)


class Clocked:
    """An objective as `fit` plays it, watched.

    Round 0 warms up, in round 1 waits and saved activations are counted. Those after it are timed and their passes counted, for
    a rollout's length is drawn; between them, in alternation because machines are noisy, every kind of pass is made bare."""

    def __init__(self, study: Study, source: Source | Buckets) -> None:
        self.study, self.source, self.inner = study, source, study.config.objective
        self.waits, self.passes = Waits(), Passes(study.roles)
        self.saved: dict[str, int] = {}
        self.rounds: list[tuple[float, Counter[Kind]]] = []
        self.bare: defaultdict[Kind, list[float]] = defaultdict(list)

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def round(self, step: int) -> Iterator[Turn]:
        turns = self.inner.round(step)
        if step == 0:
            yield from turns
        elif step == 1:
            with self.waits:
                yield from (replace(turn, loss=partial(self._saved, turn)) for turn in turns)
        else:
            began = time.perf_counter()
            with self.passes:
                yield from turns  # the trainer makes the updates
            self.rounds.append((_since(began), self.passes.made.copy()))
            for kind in self.passes.made:
                self._bare(*kind)
            self.passes.made.clear()

    def _saved(self, turn: Turn, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        kept: list[Losses] = []
        self.saved[turn.player] = saved_bytes(lambda: kept.append(turn.loss(nets, batch, rng)))
        return kept[0]

    def _bare(self, name: str, grad: bool, rows: int) -> None:
        """Times a forward pass of a network, and a backward one if it is to have a gradient."""
        teacher, role = self.study.teacher, self.study.roles[name]
        cond, shape, *_ = self.source.draw(rows, stream(0, 0, 0, 0))
        x, t = torch.randn(shape), teacher.schedule.model_time(torch.full((rows,), 0.5, dtype=torch.float64)).float()
        role.requires_grad_(grad)
        began = time.perf_counter()
        with torch.set_grad_enabled(grad):
            out = teacher.family.call(role, x, t, cond)
            if grad:
                out.sum().backward()
        self.bare[name, grad, rows].append(_since(began))
        role.zero_grad(set_to_none=True)


def bench(path: str, weights: str, repeats: int) -> dict[str, Any]:
    """The numbers of one kind of roles."""
    role = {"weights": weights, "rank": 16}
    rounds = repeats + 2
    train = {"batch": BATCH, "rounds": rounds, "log_every": rounds, "save_every": rounds, "device": "cpu"}
    tree = {"teacher": {"path": path, "guidance": 3.0}, "student": role, "critic": role, "objective": {"name": "dmd"}}
    study = open_study(parse({**tree, "data": {"prompts": "zoo:sprites"}, "train": train}))
    source = open_source(study.teacher, prompts="zoo:sprites", images=None, images_needed=False, cache=None, progress=False)
    clocked: Any = Clocked(study, source)
    with tempfile.TemporaryDirectory() as folder:
        fit(Job(clocked, study.roles, study.nets, source, study.config.train, Path(folder)))
    ms = {kind: statistics.median(times) for kind, times in clocked.bare.items()}
    must = [sum(ms[kind] * count for kind, count in made.items()) for _, made in clocked.rounds]
    passes = sum((made for _, made in clocked.rounds), Counter[Kind]())
    return {
        "roles": weights,
        "passes": {f"{n}, batch {b}, {'with' if g else 'no'} gradient": round(c / repeats, 2) for (n, g, b), c in passes.items()},
        "round_ms": round(statistics.median(spent for spent, _ in clocked.rounds), 1),
        "bare_passes_ms": round(statistics.median(must), 1),
        "ratio": round(statistics.median(spent / least for (spent, _), least in zip(clocked.rounds, must, strict=True)), 3),
        "host_waits_a_round": clocked.waits.count,
        "saved_activation_bytes": clocked.saved,
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
