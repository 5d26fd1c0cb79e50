"""Bands in which a healthy run's numbers lie, and one line of advice for each that leaves its band."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from statistics import median

Record = Mapping[str, float | None]


@dataclass(frozen=True)
class Band:
    """Where numbers whose name matches `metric` are healthy; `records` in a row outside of it bring the advice.

    Latents are scaled to a spread of about 1 in every family, so bounds on them need no unit."""

    metric: str
    advice: str
    low: float = -math.inf
    high: float = math.inf
    records: int = 1


BANDS = (
    Band("*/skipped", "updates that were not finite were skipped; lower train.lr, or set train.dtype: float32", high=0),
    Band(
        "*/grad_norm",
        "hardly any gradient is left; if the pictures are not good, a loss has lost its graph or its data",
        low=1e-8,
    ),
    Band("*/grad_rise", "the gradient is many times its median; lower this player's learning rate", high=20, records=2),
    Band(
        "*/over_linear",
        "the critic knows its samples no better than a linear denoiser does; raise critic_turns or train.critic_lr",
        high=1.0,
        records=3,
    ),
    Band(
        "*/gap",
        "the heads do not tell real from fake, so the student learns nothing of them; raise train.heads_lr or judge_weight",
        low=0.01,
        records=5,
    ),
    Band(
        "*/gap",
        "the heads see through the student with ease, which leaves it no direction; lower train.heads_lr, or set r1",
        high=5,
        records=3,
    ),
    Band(
        "student/x0_std",
        "the student's latents are flat: it may have collapsed; lower train.lr, look at grids/",
        low=0.1,
        records=3,
    ),
    Band("student/x0_std", "the student's latents spread too far; lower train.lr or teacher.guidance", high=2.5, records=2),
    Band("student/x0_max", "single latents are far out of range; lower train.lr or teacher.guidance", high=20, records=2),
    Band(
        "student/x0_drift",
        "the latents' mean walks away; lower train.lr or teacher.guidance, or give the critic more turns",
        high=1,
    ),
    Band(
        "pictures/contrast", "the student is paler than its teacher; train longer, or raise teacher.guidance", low=0.6, records=2
    ),
    Band("pictures/contrast", "the student is harsher than its teacher; lower teacher.guidance or train.lr", high=1.5),
    Band("pictures/saturation", "the student's colours are greyer than its teacher's; train longer", low=0.5, records=2),
    Band("pictures/saturation", "the student's colours are oversaturated; lower teacher.guidance, stop earlier", high=1.6),
    Band("pictures/clipped", "many pixels are clipped that are not in the teacher's; lower teacher.guidance", high=0.15),
    Band("pictures/shift", "the pictures are tinted or darker than the teacher's; lower train.lr, stop earlier", high=0.15),
)


@dataclass(frozen=True)
class Advice:
    """That a number left its band."""

    round: int
    metric: str
    value: float | None
    text: str

    def __str__(self) -> str:
        value = "not a finite number" if self.value is None else f"{self.value:.3g}"
        return f"round {self.round}: {self.metric} is {value}: {self.text}"


class Adviser:
    """Reads a run's records in their order and gives each advice once. One that has read the same records is in the same state,
    so a resumed run repeats nothing."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.first: dict[str, float] = {}
        self.norms: dict[str, list[float]] = defaultdict(list)
        self.outside: Counter[tuple[int, str]] = Counter()
        self.said: set[tuple[int, str]] = set()
        for record in records:
            self.read(record)

    def read(self, record: Record) -> tuple[dict[str, float | None], list[Advice]]:
        """(the record with what follows from it and those before: */grad_rise, */over_linear, student/x0_drift; new advice)."""
        record = {k: None if v is None or not math.isfinite(v) else v for k, v in record.items()}
        record |= self._compared(record)
        return record, [advice for name, value in record.items() for advice in self._judged(record, name, value)]

    def _judged(self, record: Record, name: str, value: float | None) -> list[Advice]:
        if value is None:
            reasons = [(-1, "it overflowed or divided by 0; lower train.lr, or set train.dtype: float32")]
        else:
            reasons = []
            for i, band in enumerate(BANDS):
                if fnmatch(name, band.metric):
                    self.outside[i, name] = 0 if band.low <= value <= band.high else self.outside[i, name] + 1
                    if self.outside[i, name] >= band.records:
                        reasons.append((i, band.advice))
        new = [(i, text) for i, text in reasons if (i, name) not in self.said]
        self.said |= {(i, name) for i, _ in new}
        return [Advice(int(record["round"] or 0), name, value, text) for _, text in new]

    def _compared(self, record: Record) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, value in record.items():
            if value is None:
                continue
            if name.endswith("/grad_norm"):
                usual = self.norms[name]
                if len(usual) >= 3 and median(usual) > 0:
                    found[name.removesuffix("norm") + "rise"] = value / median(usual)
                usual.append(value)
            if name.endswith("_linear") and (loss := record.get(name.removesuffix("_linear"))) is not None and value > 0:
                found[f"{name.split('/')[0]}/over_linear"] = loss / value
        means = {k: v for k, v in record.items() if k.startswith("student/x0_mean_") and v is not None}
        if means:
            here = means | {"spread": record.get("student/x0_std") or 0.0}
            self.first = self.first or here
            spread = max(here["spread"], self.first["spread"], 1e-6)
            found["student/x0_drift"] = max(abs(v - self.first.get(k, v)) for k, v in means.items()) / spread
        return found
