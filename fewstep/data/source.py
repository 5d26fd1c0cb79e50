"""What a run learns from: the teacher's encodings of prompts and images, drawn from by a stateless stream."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.data.cache import cached
from fewstep.data.fingerprint import fingerprint
from fewstep.data.images import ImageSet, read_images
from fewstep.data.pairs import Pairs, make_pairs
from fewstep.data.prompts import read_prompts
from fewstep.denoiser import Cond, cat
from fewstep.progress import track
from fewstep.stream import Stream

if TYPE_CHECKING:
    from fewstep.adapters import Teacher


@dataclass(frozen=True)
class Source:
    """Rows to learn from, on the CPU: conditions (N), latents (N, C, *S) or None; shape (C, *S) of one sample; where the
    latents are the teacher's own samples, the noise (N, C, *S) of each."""

    cond: Cond
    null: Cond
    latents: Tensor | None
    prompts: list[str]
    shape: tuple[int, ...]
    noise: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def draw(self, n: int, rng: Stream) -> tuple[Cond, Tensor | None, Tensor | None]:
        """Conditions, latents and noise of n rows at random, with replacement. They depend on the stream alone: a run has no
        place in its data to remember."""
        rows = rng.integers(len(self), n)
        latents, noise = (None if x is None else x[rows] for x in (self.latents, self.noise))
        return self.cond[rows], latents, noise


def open_source(
    teacher: Teacher,
    *,
    prompts: str | None = None,
    images: str | None = None,
    images_needed: bool,
    pairs: Pairs | None = None,
    cache: Path | None,
    batch: int = 64,
    progress: bool = False,
) -> Source:
    """Reads prompts (or images, whose captions are the prompts) and encodes them with the teacher, or finds that done in `cache`.

    prompts, images: see `read_prompts`, `read_images`; exactly one of them. images_needed: whether latents are wanted. pairs:
    the teacher's own samples for some of the prompts, which are then the rows.
    Raises ValueError before anything is read if they do not fit together."""
    if images is None and images_needed and pairs is None:
        instead = ", in place of data.prompts" if prompts is not None else ""
        raise ValueError(f"objective needs images: add data.images (a folder with captions) or data.images: zoo:sprites{instead}")
    if images is not None and prompts is not None:
        raise ValueError("data.prompts and data.images are both given; keep one (the captions of the images are the prompts)")
    if images is None and prompts is None:
        raise ValueError("there is no data: add data.prompts (a file, or zoo:sprites) or data.images (a folder, or zoo:sprites)")
    made_by = {"version": 1, "teacher": fingerprint(teacher)}
    pictures = None
    if images is not None:
        pictures = read_images(images, teacher.resolution, captioned=_has_conditions(teacher), cache=cache)
    texts = list(pictures.captions) if pictures is not None else read_prompts(prompts or "")
    if pairs is not None:
        texts = [texts[i] for i in pairs.chosen(len(texts))]
    conds = cached(cache, made_by | _conds_key(texts), lambda: _encode(teacher, texts, batch, progress))
    cond, latents, noise = _part(conds, "cond."), None, None
    if pairs is not None:
        noise, latents = make_pairs(teacher, pairs, texts, cond, cache, progress)
    elif pictures is not None and images_needed:
        known = made_by | {"kind": "latents", "images": pictures.digest, "resolution": list(teacher.resolution)}
        latents = cached(cache, known, lambda: _to_latents(teacher, pictures, batch, progress))["latents"]
    return Source(cond, _part(conds, "null."), latents, texts, teacher.latent_shape, noise)


def _has_conditions(teacher: Teacher) -> bool:
    from fewstep.families import net_config

    return any(teacher.family.examples) or bool(net_config(teacher.net).get("num_class_embeds"))


def _conds_key(texts: list[str]) -> dict[str, str]:
    return {"kind": "prompts", "prompts": hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()}


def _encode(teacher: Teacher, texts: list[str], batch: int, progress: bool) -> dict[str, Tensor]:
    starts = track(range(0, len(texts), batch), "encoding prompts", len(texts), each=batch, active=progress)
    cond = cat([teacher.encode(texts[i : i + batch]).to("cpu") for i in starts])
    both = {"cond.": cond, "null.": teacher.null()}
    return {name + k: v for name, c in both.items() for k, v in c.tensors.items()}


def _part(tensors: dict[str, Tensor], name: str) -> Cond:
    return Cond({k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)})


def _to_latents(teacher: Teacher, images: ImageSet, batch: int, progress: bool) -> dict[str, Tensor]:
    def one(start: int) -> Tensor:
        return teacher.to_latents(images.load(range(start, min(start + batch, len(images))), teacher.resolution))

    starts = track(range(0, len(images), batch), "encoding images", len(images), each=batch, active=progress)
    return {"latents": torch.cat([one(i) for i in starts])}
