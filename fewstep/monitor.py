"""What a run says of itself: running means, metrics.jsonl, advice.jsonl, TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.advice import Advice, Adviser
from fewstep.costs import Passes, forget_peak, peak_gb
from fewstep.objectives.base import Losses
from fewstep.progress import say

# What a run has taken: on the wall, and of processors, which a busy machine does not lengthen as much.
CLOCKS: Mapping[str, Callable[[], float]] = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}


class Meter:
    """Means of scalars between two log lines, kept on the device: reading them is the only place that waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.counts[name] += 1

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call; `reduce` averages over processes."""
        if not self.sums:
            return {}
        means = reduce(torch.stack([s / self.counts[k] for k, s in self.sums.items()])).tolist()
        found = dict(zip(self.sums, means, strict=True))
        self.sums.clear()
        self.counts.clear()
        return found


def describe(x: Tensor) -> dict[str, Tensor]:
    """Scalars of samples (B, C, *S), left on their device: spread, largest magnitude, mean of each channel."""
    x = x.detach().float()
    means = x.transpose(0, 1).flatten(1).mean(1)
    return {"x0_std": x.std(), "x0_max": x.abs().amax()} | {f"x0_mean_{i}": m for i, m in enumerate(means.unbind())}


def compare(student: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """The student's pictures uint8 (N, H, W, C) beside the teacher's of the same prompts and noise: ratio of contrast (spread of
    a picture's pixels) and of saturation (HSV), share of clipped pixels beyond the teacher's, largest shift of a channel's mean
    (1 is black to white)."""
    (contrast, saturation, clipped, mean), theirs = _look(student), _look(teacher)
    return {
        "pictures/contrast": contrast / max(theirs[0], 1e-6),
        "pictures/saturation": (saturation + 0.01) / (theirs[1] + 0.01),  # grey on grey is 1
        "pictures/clipped": clipped - theirs[2],
        "pictures/shift": float(np.abs(mean - theirs[3]).max()),
    }


def _look(pictures: np.ndarray) -> tuple[float, float, float, np.ndarray]:
    x = pictures.astype(np.float32) / 255
    top = x.max(-1)
    saturation = (top - x.min(-1)) / np.maximum(top, 1 / 255)
    clipped = np.isin(pictures, (0, 255)).mean()
    return float(x.std((1, 2, 3)).mean()), float(saturation.mean()), float(clipped), x.mean((0, 1, 2))


class Log:
    """metrics.jsonl and advice.jsonl, and TensorBoard beside them where that is installed."""

    def __init__(self, folder: Path, active: bool) -> None:
        self.file, self.advice, self.active, self.board = folder / "metrics.jsonl", folder / "advice.jsonl", active, None
        if active:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(folder / "tensorboard"))
            except ImportError:
                pass

    def forget_after(self, round_: int) -> list[dict[str, float | None]]:
        """Drops what a killed run logged beyond its last checkpoint, for those rounds are about to be run again; returns the
        metrics that stay."""
        if not self.active:
            return []
        kept: dict[Path, list[str]] = {}
        for file in (self.file, self.advice):
            lines = file.read_text().splitlines() if file.exists() else []
            kept[file] = [x for x in lines if _round_of(x) <= round_]
            if kept[file] != lines:
                scratch = file.with_suffix(".tmp")
                scratch.write_text("".join(x + "\n" for x in kept[file]))
                os.replace(scratch, file)
        return [json.loads(line) for line in kept[self.file]]

    def write(self, record: Mapping[str, float | None], advice: Iterable[Advice] = ()) -> None:
        """Adds a record, with null for what is not finite, and the advice it gave rise to."""
        if not self.active:
            return
        record = {k: v if v is not None and math.isfinite(v) else None for k, v in record.items()}
        _append(self.file, [record])
        _append(self.advice, [asdict(one) for one in advice])
        if self.board is not None:
            for name, value in record.items():
                if value is not None:
                    self.board.add_scalar(name, value, int(record["round"] or 0))


def _append(file: Path, records: Sequence[Mapping[str, object]]) -> None:
    if records:
        with file.open("a") as f:
            f.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def _round_of(line: str) -> float:
    try:
        return json.loads(line)["round"]
    except (json.JSONDecodeError, KeyError):
        return math.inf  # a line cut short by the kill


class Monitor:
    """A run's watch from round `start` on: what its turns and networks do, in records with advice; it goes on from the records
    that the run has left in its folder."""

    def __init__(self, folder: Path, networks: Mapping[str, nn.Module], start: int, *, active: bool) -> None:
        self.log, self.meter, self.logged = Log(folder, active), Meter(), start
        before = self.log.forget_after(start)
        self.adviser = Adviser(before)
        no_denoisers = ("heads", "weighting")  # fed features, fed times
        self.passes = Passes({name: net for name, net in networks.items() if name not in no_denoisers})
        spent = {clock: max((r.get(clock) or 0.0 for r in before), default=0.0) for clock in CLOCKS}
        self.began = {clock: now() - spent[clock] for clock, now in CLOCKS.items()}
        forget_peak()

    def turn(self, player: str, losses: Losses, norms: Mapping[str, Tensor]) -> None:
        """Takes in a turn of a player: what it lost, and the gradient norm of everyone who moved."""
        found = {f"{player}/{name}": term.mean() for name, term in losses.terms.items()}
        found |= {f"{player}/{name}": value for name, value in losses.stats.items()}
        found |= {f"{name}/grad_norm": norm for name, norm in norms.items()}
        if player == "student" and losses.sample is not None:
            found |= {f"student/{name}": value for name, value in describe(losses.sample).items()}
        for name, value in found.items():
            self.meter.add(name, value)

    def record(
        self, round_: int, batch: int, skipped: Mapping[str, float], reduce: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Logs and returns the means since the last record, and what that took: seconds, passes a round, memory."""
        found: dict[str, float] = {"round": round_} | {clock: now() - self.began[clock] for clock, now in CLOCKS.items()}
        found |= {"peak_gb": peak_gb(), **self.meter.take(reduce)}
        found |= {f"{name}/skipped": times for name, times in skipped.items()}
        found |= self.passes.take(batch, round_ - self.logged)
        self.logged = round_
        self.tell(found)
        return found

    def tell(self, record: Mapping[str, float]) -> None:
        """Logs a record with what follows from it, and says what has left its band. One that holds its round alone is nothing."""
        if len(record) > 1:
            whole, advice = self.adviser.read(record)
            self.log.write(whole, advice)
            for one in advice:
                say(str(one))
