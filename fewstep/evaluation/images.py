"""Image folders (PNG files and manifest.jsonl) in and out, and the one conversion to uint8."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

MANIFEST = "manifest.jsonl"
_LOSSY = {".jpg", ".jpeg", ".webp"}
BATCH = 256


@dataclass(frozen=True)
class ImageFolder:
    """What a folder holds: images (N, H, W, 3) uint8 in the order of files, paths in it; prompts and seeds (N,), or None without
    a manifest."""

    images: np.ndarray
    files: list[str]
    prompts: list[str] | None
    seeds: list[int] | None


def to_uint8(x: np.ndarray | torch.Tensor) -> np.ndarray:
    """Floats of any shape, [-1, 1], as uint8 of that shape, rounded to the nearest level and clamped.

    Raises ValueError for NaN or infinity: a picture that is not a number is an event, not a black pixel.
    """
    values = x.detach().to("cpu", torch.float32).numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float32)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(
            f"{bad} of {values.size} pixel values are NaN or infinite; look at the sampler before judging its images"
        )
    return np.clip(np.floor(values * 127.5 + 128), 0, 255).astype(np.uint8)


def check(images: np.ndarray) -> None:
    """Raises ValueError unless `images` is a non-empty uint8 array (N, H, W, 3) that uses the range 0 to 255."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise ValueError(f"images must be a uint8 numpy array, not {kind}; convert floats in [-1, 1] with images.to_uint8")
    if images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise ValueError(f"images must have the shape (N, H, W, 3), not {images.shape}; move the channels last")
    if images.max() == 1:
        raise ValueError("no pixel exceeds 1: images in [0, 1] were cast to uint8; multiply them by 255 and round first")


def digests(images: np.ndarray) -> np.ndarray:
    """One 64-bit content hash (N,) uint64 an image of (N, H, W, 3) uint8."""
    raw = (hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images)
    return np.frombuffer(b"".join(raw), "<u8")


def read_image(file: Path, size: int | None = None) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of one file; grey is repeated to three channels, an opaque alpha dropped, EXIF rotation applied.

    With a size, read and cut to that square as training does. Raises ValueError for what is no image, and, without a size, for
    transparency and for more than eight bits a channel.
    """
    from fewstep.data.pictures import DAMAGE, decode, fit

    try:
        if size is not None:
            return fit(decode(file.read_bytes()), (size, size))
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
    except DAMAGE as error:
        raise ValueError(f"{file} cannot be read as an image ({error}); save it again as PNG, or remove it") from error
    if picture.mode == "P":
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    if picture.mode in ("RGBA", "LA"):
        if np.asarray(picture)[..., -1].min() < 255:
            raise ValueError(f"{file} is transparent; composite it on a background of your choice and save it as RGB")
        picture = picture.convert("RGB")
    if picture.mode not in ("RGB", "L", "1"):
        raise ValueError(f"{file} has the mode {picture.mode!r}; save it as 8-bit RGB")
    return np.asarray(picture.convert("RGB"))


def list_images(folder: str | Path) -> list[Path]:
    """The image files of a folder at any depth, sorted by name; warns about lossy and unread ones, raises ValueError if there are
    none."""
    from fewstep.data.pictures import SUFFIXES, listed, unread

    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder}; give a folder of PNG files")
    files, others = listed(Path(folder), SUFFIXES), unread(Path(folder))
    if not files:
        raise ValueError(f"{others}; save them as PNG" if others else f"{folder} holds no images; expected PNG files")
    if others:
        warnings.warn(f"{others} and are left out; save them as PNG to have them judged", stacklevel=2)
    lossy = [f.name for f in files if f.suffix.lower() in _LOSSY]
    if lossy:
        warnings.warn(
            f"{len(lossy)} files of {folder} are lossy ({lossy[0]}): compression alone moves every score; save PNG", stacklevel=2
        )
    return files


def stream(folder: str | Path, size: int | None = None) -> Iterator[np.ndarray]:
    """Batches (<=BATCH, H, W, 3) uint8 of a folder in file order, cut to squares of a size if one is given.

    Raises ValueError on mixed sizes."""
    yield from _batches(list_images(folder), size)


def _batches(files: Sequence[Path], size: int | None = None) -> Iterator[np.ndarray]:
    shape = None
    for start in range(0, len(files), BATCH):
        pictures = []
        for file in files[start : start + BATCH]:
            pixels = read_image(file, size)
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise ValueError(
                    f"{file} is {pixels.shape[1]}x{pixels.shape[0]}, {files[0].name} {shape[1]}x{shape[0]}; resize them alike"
                    " (references: a protocol's size, as in size: 512, cuts them)"
                )
            pictures.append(pixels)
        yield np.stack(pictures)


def load_folder(folder: str | Path) -> ImageFolder:
    """A folder of images with its manifest, paired by path in it. Raises ValueError if the manifest misses a file."""
    paths = list_images(folder)
    files = [f.relative_to(folder).as_posix() for f in paths]
    manifest = Path(folder) / MANIFEST
    prompts = seeds = None
    if manifest.exists():
        records = {}
        for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                records[record["file"]] = (str(record["prompt"]), int(record["seed"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{manifest}, line {number}: expected {{file, prompt, seed}}, got {line[:80]!r}") from error
        missing = [f for f in files if f not in records]
        if missing:
            raise ValueError(f"{manifest} says nothing of {missing[0]} ({len(missing)} files in all); write the manifest anew")
        absent = sorted(set(records) - set(files))
        if absent:
            raise ValueError(f"{manifest} lists {absent[0]}, which is gone ({len(absent)} files in all); sample the folder again")
        prompts, seeds = [records[f][0] for f in files], [records[f][1] for f in files]
    return ImageFolder(np.concatenate(list(_batches(paths))), files, prompts, seeds)


def save_folder(
    folder: str | Path, images: np.ndarray, prompts: Sequence[str], seeds: Sequence[int], *, start: int = 0
) -> list[Path]:
    """Writes (N, H, W, 3) uint8 as lossless PNG files numbered from `start`, and their manifest lines; returns the files."""
    check(images)
    if not len(images) == len(prompts) == len(seeds):
        raise ValueError(f"{len(images)} images, {len(prompts)} prompts and {len(seeds)} seeds; give one of each an image")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{start + i:06d}.png" for i in range(len(images))]
    with (folder / MANIFEST).open("a" if start else "w", encoding="utf-8") as manifest:
        for i, (file, image, prompt, seed) in enumerate(zip(files, images, prompts, seeds, strict=True), start):
            Image.fromarray(image).save(file)
            manifest.write(
                json.dumps({"file": file.name, "prompt": prompt, "seed": int(seed), "index": i}, ensure_ascii=False) + "\n"
            )
    return files
