"""What a run learns from: the teacher's encodings of prompts and images, drawn from by a stateless stream."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep.data.cache import cached
from fewstep.data.images import ImageSet, read_images
from fewstep.data.prompts import read_prompts
from fewstep.denoiser import Cond, cat
from fewstep.progress import track
from fewstep.stream import Stream

if TYPE_CHECKING:
    from fewstep.adapters import Teacher

_ENCODERS = ("text_encoder", "tokenizer", "vae")  # components whose names start so decide what an encoding is


@dataclass(frozen=True)
class Source:
    """Rows to learn from, on the CPU: conditions (N), latents (N, C, H, W) or None; shape (C, H, W) of one sample."""

    cond: Cond
    null: Cond
    latents: Tensor | None
    prompts: list[str]
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.prompts)

    def draw(self, n: int, rng: Stream) -> tuple[Cond, Tensor | None]:
        """n rows at random, with replacement. They depend on the stream alone: a run has no place in its data to remember."""
        rows = rng.integers(len(self), n)
        return self.cond[rows], None if self.latents is None else self.latents[rows]


def open_source(
    teacher: Teacher,
    *,
    prompts: str | None = None,
    images: str | None = None,
    images_needed: bool,
    cache: Path | None,
    batch: int = 64,
    progress: bool = False,
) -> Source:
    """Reads prompts (or images, whose captions are the prompts) and encodes them with the teacher, or finds that done in `cache`.

    prompts, images: see `read_prompts`, `read_images`; exactly one of them. images_needed: whether latents are wanted.
    Raises ValueError before anything is read if they do not fit together."""
    if images is None and images_needed:
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
    conds = cached(cache, made_by | _conds_key(texts), lambda: _encode(teacher, texts, batch, progress))
    latents = None
    if pictures is not None and images_needed:
        known = made_by | {"kind": "latents", "images": pictures.digest, "resolution": list(teacher.resolution)}
        latents = cached(cache, known, lambda: _to_latents(teacher, pictures, batch, progress))["latents"]
    return Source(_part(conds, "cond."), _part(conds, "null."), latents, texts, teacher.latent_shape)


def fingerprint(teacher: Teacher) -> str:
    """A hash of what decides the teacher's encodings: configs, tokenizers, and the weights of text encoders and VAE."""
    parts = {k: v for k, v in teacher.pipe.components.items() if k.startswith(_ENCODERS) and v is not None}
    dtypes = {k: str(next(v.parameters()).dtype) for k, v in parts.items() if isinstance(v, nn.Module)}
    found: dict[str, Any] = {"dtypes": dtypes}
    folder = _local(teacher.path)
    if folder is not None:
        configs = [folder / "model_index.json", *folder.glob("*/config.json")]
        files = {*configs, *(f for name in parts for f in (folder / name).rglob("*") if f.is_file())}
        found |= {f.relative_to(folder).as_posix(): _sha256(f) for f in files}
    else:  # a hub id, or made in memory: no folder to read, so the loaded weights speak for themselves
        found |= {"pipe": repr(teacher.pipe), **{k: repr(v) for k, v in parts.items()}}
        found |= {f"{k} weights": _weights(v) for k, v in parts.items() if isinstance(v, nn.Module)}
    return hashlib.blake2b(json.dumps(found, sort_keys=True).encode(), digest_size=16).hexdigest()


def _local(path: str) -> Path | None:
    from fewstep.adapters import teacher_folder

    return teacher_folder(path) if path.startswith("zoo:") or Path(path).is_dir() else None


def _sha256(file: Path) -> str:
    with file.open("rb") as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()


def _weights(module: nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _has_conditions(teacher: Teacher) -> bool:
    from fewstep.families import net_config

    reads = any(k.startswith("text_encoder") and v is not None for k, v in teacher.pipe.components.items())
    return reads or bool(net_config(teacher.net).get("num_class_embeds"))


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
