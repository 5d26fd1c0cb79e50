"""What a run learns from: the teacher's encodings of prompts and images, drawn from by a stateless stream."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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


ENCODED_AT_ONCE = 64


class Drawn(NamedTuple):
    """A batch on the CPU: conditions (B), the shape (B, C, *S) of a batch, and where there are some, latents and noise."""

    cond: Cond
    shape: tuple[int, ...]
    latents: Tensor | None
    noise: Tensor | None


@dataclass(frozen=True)
class Source:
    """Rows to learn from, on the CPU: conditions (N), latents (N, C, *S) or None; shape (C, *S) of one sample; where the
    latents are the teacher's own samples, the noise (N, C, *S) of each; where they are of images, the hash of those."""

    cond: Cond
    null: Cond
    latents: Tensor | None
    prompts: list[str]
    shape: tuple[int, ...]
    noise: Tensor | None = None
    pictures: str = ""

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, n: int) -> Cond:
        """Conditions of the first n rows."""
        return self.cond[:n]

    def draw(self, n: int, rng: Stream) -> Drawn:
        """n rows at random, with replacement. They depend on the stream alone: a run has no place in its data to remember."""
        rows = rng.integers(len(self), n)
        latents, noise = (None if x is None else x[rows] for x in (self.latents, self.noise))
        return Drawn(self.cond[rows], (n, *self.shape), latents, noise)


@dataclass(frozen=True)
class Buckets:
    """Rows of several shapes, each source with those of one. A batch has one shape, and every row is in it as often as if there
    were no shapes."""

    sources: tuple[Source, ...]

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def first(self, n: int) -> Cond:
        """Conditions of the first n rows, each for its own shape."""
        return cat([source.cond[:n] for source in self.sources])[:n]

    def draw(self, n: int, rng: Stream) -> Drawn:
        """n rows, as a Source draws them, of the shape that one row at random has. Each process draws its own: the shapes have
        about one area, so none waits for another."""
        row = rng.integer(len(self))
        for source in self.sources:
            if row < len(source):
                return source.draw(n, rng)
            row -= len(source)
        raise AssertionError


def open_source(
    teacher: Teacher,
    *,
    prompts: str | None = None,
    images: str | None = None,
    images_needed: bool,
    pairs: Pairs | None = None,
    aspect: float = 1.0,
    cache: Path | None,
    batch: int = ENCODED_AT_ONCE,
    progress: bool = False,
) -> Source | Buckets:
    """Reads prompts (or images, whose captions are the prompts) and encodes them with the teacher, or finds that done in `cache`.

    prompts, images: see `read_prompts`, `read_images`; exactly one of them. images_needed: whether latents are wanted. pairs:
    the teacher's own samples for some of the prompts, which are then the rows. aspect: the shapes that rows come in, see
    `Teacher.sizes`: for images the nearest to their own; prompts come in all, and are shared out among them to make pairs.
    Raises ValueError before anything is read if they do not fit together."""
    _check(prompts, images, images_needed and pairs is None)
    made_by = {"version": 1, "teacher": fingerprint(teacher)}
    teachers = [teacher.at(size) for size in teacher.sizes(aspect)]
    shapes, pictures = [t.resolution for t in teachers], None
    if images is not None:
        pictures = read_images(images, *shapes, captioned=_has_conditions(teacher), cache=cache)
    texts = list(pictures.captions) if pictures is not None else read_prompts(prompts or "")
    if pairs is not None:
        texts = [texts[i] for i in pairs.chosen(len(texts))]
    conds = cached(cache, made_by | _conds_key(texts), lambda: _encode(teacher, texts, batch, progress))
    cond, null = _part(conds, "cond."), _part(conds, "null.")
    every = range(len(texts))
    if pictures is not None:
        shares: list[Sequence[int]] = list(pictures.rows_nearest(shapes))
    else:
        shares = [every if pairs is None else every[k :: len(shapes)] for k in range(len(shapes))]

    def of_one_shape(teacher: Teacher, rows: Sequence[int]) -> Source:
        words = teacher.resized(cond if len(rows) == len(texts) else cond[torch.tensor(rows)])
        said, latents, noise, seen = [texts[i] for i in rows], None, None, ""
        if pairs is not None:
            noise, latents = make_pairs(teacher, pairs, said, words, cache, progress)
        elif pictures is not None and images_needed:
            part = pictures.part(rows)
            known = made_by | {"kind": "latents", "images": part.digest, "resolution": list(teacher.resolution)}
            latents, seen = cached(cache, known, partial(_to_latents, teacher, part, batch, progress))["latents"], part.digest
        return Source(words, null, latents, said, teacher.latent_shape, noise, seen)

    sources = tuple(of_one_shape(teacher, rows) for teacher, rows in zip(teachers, shares, strict=True) if rows)
    return sources[0] if len(sources) == 1 else Buckets(sources)


def _check(prompts: str | None, images: str | None, images_needed: bool) -> None:
    if images is None and images_needed:
        instead = ", in place of data.prompts" if prompts is not None else ""
        raise ValueError(f"objective needs images: add data.images (a folder with captions) or data.images: zoo:sprites{instead}")
    if images is not None and prompts is not None:
        raise ValueError("data.prompts and data.images are both given; keep one (the captions of the images are the prompts)")
    if images is None and prompts is None:
        raise ValueError("there is no data: add data.prompts (a file, or zoo:sprites) or data.images (a folder, or zoo:sprites)")


def _has_conditions(teacher: Teacher) -> bool:
    from fewstep.families import net_config

    return any(teacher.family.examples) or bool(net_config(teacher.net).get("num_class_embeds"))


def _conds_key(texts: list[str]) -> dict[str, Any]:
    """Version 2: how many tokens a prompt has, where there was a mask of them."""
    return {"kind": "prompts", "version": 2, "prompts": hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()}


def _encode(teacher: Teacher, texts: list[str], batch: int, progress: bool) -> dict[str, Tensor]:
    if teacher.family.tokens is not None:
        counts, read = teacher.family.tokens(teacher.pipe, texts)
        if cut := sum(n > read for n in counts):
            warnings.warn(
                f"{cut} of {len(texts)} prompts are longer than the {read} tokens that this teacher reads, and cut", stacklevel=2
            )
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
