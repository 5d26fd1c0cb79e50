"""Teacher pairs: noise and the teacher's own multi-step sample from it, made once for the prompts of a run and kept on disk.

In a stage that an earlier student teaches they are that student's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.data.cache import cached
from fewstep.data.fingerprint import fingerprint
from fewstep.denoiser import Cond, Denoiser, Guided
from fewstep.progress import track
from fewstep.sampling import ddim, sample
from fewstep.stream import Stream, rows

if TYPE_CHECKING:
    from fewstep.adapters import Teacher

SEED = 60_000  # away from those of the zoo's worlds and of previews, so that nobody is judged on noise it was taught
CHUNK = 64


@dataclass(frozen=True)
class Pairs:
    """A wish: `count` samples that the guided teacher draws in `steps` deterministic steps, each with the noise it came from.

    sampler: at whose times. drawn_by: what tells an earlier student from others, where it draws in the teacher's place."""

    guided: Denoiser | Guided
    count: int
    steps: int
    sampler: str = "ddim"
    drawn_by: str = ""

    def chosen(self, n: int) -> Tensor:
        """Which of n prompts (count,): a shuffle of all, over and over, of which fewer pairs take the beginning."""
        shuffled = Stream((SEED, "pairs")).uniform(n).argsort()
        return shuffled.repeat(-(-self.count // n))[: self.count]


def make_pairs(
    teacher: Teacher, wish: Pairs, texts: Sequence[str], cond: Cond, cache: Path | None, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """(noise, samples), each (count, C, H, W) float32 on the CPU, for texts and their conditions.

    Made in chunks that are kept one by one: an interrupted run goes on behind the last, more pairs only make what is missing, and
    processes that share a cache begin at different places and share the work."""
    times = teacher.grid(wish.steps, wish.sampler)
    made_by = {
        "kind": "pairs",
        "version": 1,
        "teacher": fingerprint(teacher, *teacher.components),
        "path": hashlib.blake2b(f"{teacher.schedule} {teacher.target}".encode(), digest_size=16).hexdigest(),
        "guidance": wish.guided.scale if isinstance(wish.guided, Guided) else wish.guided.guidance,
        "times": list(times),
        "seed": SEED,
        **({"drawn_by": wish.drawn_by} if wish.drawn_by else {}),
    }
    starts = list(range(0, len(texts), CHUNK))
    first = len(starts) * int(os.environ.get("RANK", "0")) // int(os.environ.get("WORLD_SIZE", "1"))
    found, said = {}, "sampling the tutor" if wish.drawn_by else "sampling the teacher"
    for start in track([*starts[first:], *starts[:first]], said, len(texts), each=CHUNK, active=progress):
        rest = slice(start, start + CHUNK)
        key = {"start": start, "prompts": hashlib.blake2b(json.dumps(list(texts[rest])).encode(), digest_size=16).hexdigest()}
        found[start] = cached(cache, made_by | key, partial(_draw, teacher, wish, times, start, cond[rest]))
    return tuple(torch.cat([found[start][name] for start in starts]) for name in ("noise", "latents"))  # type: ignore[return-value]


@torch.no_grad()
def _draw(teacher: Teacher, wish: Pairs, times: Sequence[float], start: int, cond: Cond) -> dict[str, Tensor]:
    device, streams = next(teacher.net.parameters()).device, rows(SEED, start, start + len(cond))
    noise = streams.normal((len(cond), *teacher.latent_shape)).to(device)
    return {
        "noise": noise,
        "latents": sample(wish.guided, wish.guided.schedule.prior(noise), times, cond.to(device), step=ddim, rng=streams),
    }
