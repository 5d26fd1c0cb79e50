"""Pictures of several shapes: the sizes of about one area that a teacher can be asked for."""

from __future__ import annotations

import math
from pathlib import Path

from fewstep.families import Family, family_of
from fewstep.families.base import Config
from fewstep.folders import pipeline_name, teacher_folder

FINENESS = 16  # steps that a square's side is made of, where the family does not need larger ones


def step_of(family: Family, net: Config, vae: Config, size: tuple[int, ...]) -> int:
    """Pixels that sides are multiples of: a whole number of the network's patches (a UNet's coarsest latents; at least 2, which
    packed latents need) in the autoencoder's latents, near 1/16 of the side of a square of this area."""
    far = (*size[:-2], 4096, 4096)
    patch = net.get("patch_size") or 1
    patch = max(2, patch if isinstance(patch, int) else patch[-1])
    if "down_block_types" in net:
        patch = 2 ** (len(net["block_out_channels"]) - 1)
    need = patch * (far[-1] // family.latents(net, vae, far)[-1])
    return need * max(1, round(math.sqrt(size[-2] * size[-1]) / FINENESS / need))


def sizes_of(family: Family, net: Config, vae: Config, size: tuple[int, ...], aspect: float) -> tuple[tuple[int, ...], ...]:
    """`size`, ([frames,] height, width), and then, from wide to tall, those whose sides are multiples of `step_of` and no more
    than `aspect` times one another: to each short side the longest that keeps within the area (so that none needs more memory),
    less than a step below it. For 1024x1024 these are the widest that SDXL was trained at (arXiv 2307.01952, appendix I).
    Raises ValueError for a family that draws at one size alone."""
    *frames, height, width = size
    if aspect == 1:
        return (size,)
    _check(family)
    step, area = step_of(family, net, vae, size), height * width
    found = set()
    for short in range(step, math.isqrt(area) + 1, step):
        long = area // short // step * step
        if long <= aspect * short:
            found |= {(short, long), (long, short)}
    others = sorted(found - {(height, width)})
    return (size, *((*frames, *other) for other in others))


def check_aspect(path: str) -> None:
    """Raises ValueError where the teacher at a path is known to make pictures of one size only. Reads its index alone; of a hub
    id, or of what has moved, nothing is known before it is loaded."""
    folder = teacher_folder(path) if path.startswith("zoo:") or Path(path).exists() else None
    if folder is not None:
        _check(family_of(pipeline_name(folder)))


def _check(family: Family) -> None:
    if not family.sized:
        raise ValueError(
            "data.aspect: this teacher draws at one size alone; leave it away (all pictures are then cut to that size)"
        )
