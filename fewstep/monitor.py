"""What a run says of itself: running means, metrics.jsonl, TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor


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


class Log:
    """metrics.jsonl, and TensorBoard beside it where that is installed."""

    def __init__(self, folder: Path, active: bool) -> None:
        self.file, self.active, self.board = folder / "metrics.jsonl", active, None
        if active:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(folder / "tensorboard"))
            except ImportError:
                pass

    def forget_after(self, round_: int) -> None:
        """Drops what a killed run logged beyond its last checkpoint: those rounds are about to be run again."""
        if self.active and self.file.exists():
            lines = [x for x in self.file.read_text().splitlines() if _round_of(x) <= round_]
            scratch = self.file.with_suffix(".tmp")
            scratch.write_text("".join(x + "\n" for x in lines))
            os.replace(scratch, self.file)

    def write(self, record: Mapping[str, float]) -> None:
        if not self.active:
            return
        with self.file.open("a") as f:
            f.write(json.dumps(record) + "\n")
        if self.board is not None:
            for name, value in record.items():
                self.board.add_scalar(name, value, int(record["round"]))


def _round_of(line: str) -> float:
    try:
        return json.loads(line)["round"]
    except (json.JSONDecodeError, KeyError):
        return math.inf  # a line cut short by the kill
