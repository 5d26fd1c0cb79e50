"""Pictures of a denoiser: the one loop by which students and teachers draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fewstep.adapters import Teacher
from fewstep.denoiser import Cond
from fewstep.progress import track
from fewstep.sampling import STEPS, Predictor, sample
from fewstep.stream import rows


@torch.no_grad()
def generate(
    teacher: Teacher,
    denoiser: Predictor,
    cond: Cond,
    times: Sequence[float],
    sampler: str,
    *,
    seed: int,
    batch: int = 64,
    bar: str = "",
) -> np.ndarray:
    """Pictures uint8 (n, h, w, 3) of n conditions; picture i's noise depends on (seed, i) alone, not on batch or device."""
    device = next(teacher.net.parameters()).device
    parts = []
    for start in track(range(0, len(cond), batch), bar, len(cond), each=batch, active=bool(bar)):
        part = cond[start : start + batch].to(device)
        noise = rows(seed, start, start + len(part))
        x = denoiser.schedule.prior(noise.normal((len(part), *teacher.latent_shape)).to(device))
        parts.append(teacher.to_images(sample(denoiser, x, times, part, step=STEPS[sampler], rng=noise)))
    return np.concatenate(parts)
