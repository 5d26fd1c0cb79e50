"""Captioned images from a folder, or from the embedded world."""

from __future__ import annotations

import hashlib
import inspect
import io
import struct
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fewstep.data.cache import cached
from fewstep.data.prompts import prompt_of, read_jsonl, read_text

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"
ZOO_SEED, ZOO_CHUNK, ZOO_COUNT = 60_000, 4096, 8192
# What Pillow raises for bytes that are no image, or half of one.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageSet:
    """Captioned images that are known to decode: files, or pixels (N, H, W, 3) uint8. digest: hash of their content, in order."""

    captions: tuple[str, ...]
    digest: str
    files: tuple[Path, ...] = ()
    pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def load(self, indices: Sequence[int], resolution: tuple[int, int]) -> np.ndarray:
        """Images (n, h, w, 3) uint8, cut to the shape of resolution (height, width) about the centre, then resized (Lanczos).

        Raises ValueError for a file that was damaged after it was read first."""
        if self.pixels is not None:
            if self.pixels.shape[1:3] == tuple(resolution):
                return self.pixels[np.asarray(indices, dtype=np.int64)]
            return np.stack([fit(Image.fromarray(self.pixels[i]), resolution) for i in indices])

        def one(index: int) -> np.ndarray:
            try:
                return fit(decode(self.files[index].read_bytes()), resolution)
            except _DAMAGE as error:
                raise ValueError(f"{self.files[index]} can no longer be read ({error}); start again") from error

        with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
            return np.stack(list(pool.map(one, indices)))


def decode(raw: bytes) -> Image.Image:
    """The picture in a file's bytes as RGB: upright, on white where it is transparent, 16 bits rounded to 8."""
    with Image.open(io.BytesIO(raw)) as picture:
        upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.asarray(upright).astype(np.float32) / 257).round().astype(np.uint8))
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    white = Image.new("RGBA", upright.size, "white")
    white.alpha_composite(upright.convert("RGBA"))
    return white.convert("RGB")


def fit(picture: Image.Image, resolution: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) uint8: the largest centred cut of that shape, resized once."""
    height, width = resolution
    return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))


def read_images(source: str, resolution: tuple[int, int], *, captioned: bool = True, cache: Path | None = None) -> ImageSet:
    """The images of zoo:sprites, or of a folder (png, jpg, webp, with captions in metadata.jsonl or in a .txt beside each).

    Every file is decoded once; those that cannot be are left out with a warning. captioned False: a missing caption is "".
    cache: where to keep what was learned of the files. Raises ValueError for a folder without images, or captions."""
    if source.startswith("zoo:"):
        return _sprites(source, cache)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder of images at {source}; give a folder with captions, or zoo:sprites")
    files = _listed(folder)
    if not files:
        raise ValueError(f"{source} holds no images; put {', '.join(SUFFIXES)} files there")
    captions = _captions(folder, files, captioned)
    digests = _digests(files)
    known = {"kind": "sizes", "version": 1, "files": _joint(digests)}
    sizes = cached(cache, known, lambda: {"sizes": _sizes(files)})["sizes"]
    kept = [i for i, size in enumerate(sizes.tolist()) if min(size) > 0]
    if len(kept) < len(files):
        bad = next(i for i in range(len(files)) if i not in set(kept))
        said = f"{len(files) - len(kept)} of the {len(files)} images in {source} cannot be read"
        if not kept:
            raise ValueError(f"{said} (first: {files[bad]}); save them again as PNG or JPEG")
        warnings.warn(f"{said} and are left out (first: {files[bad]}); save them again or delete them", stacklevel=2)
    small = [i for i in kept if bool((sizes[i] < torch.tensor(resolution)).any())]
    if small:
        said = f"{len(small)} of the {len(kept)} images in {source} are smaller than {resolution[0]}x{resolution[1]}"
        warnings.warn(f"{said} and are enlarged (first: {files[small[0]]}); larger ones give a sharper student", stacklevel=2)
    return ImageSet(tuple(captions[i] for i in kept), _joint([digests[i] for i in kept]), files=tuple(files[i] for i in kept))


def _sprites(source: str, cache: Path | None) -> ImageSet:
    if source != "zoo:sprites":
        raise ValueError(f"there are no images at {source}; the embedded world is zoo:sprites")
    from fewstep.zoo import sprites

    seeds = [ZOO_SEED + i for i in range(ZOO_COUNT // ZOO_CHUNK)]
    program = hashlib.blake2b(inspect.getsource(sprites).encode(), digest_size=16).hexdigest()
    known = {"kind": "sprites", "version": 1, "program": program, "seeds": seeds, "chunk": ZOO_CHUNK}

    def draw() -> dict[str, Tensor]:
        return {"pixels": torch.cat([torch.from_numpy(sprites.draw(seed, ZOO_CHUNK)[0]) for seed in seeds])}

    pixels = cached(cache, known, draw)["pixels"].numpy()
    captions = tuple(caption for seed in seeds for caption in sprites.captions(seed, ZOO_CHUNK))
    return ImageSet(captions, hashlib.blake2b(pixels.data, digest_size=16).hexdigest(), pixels=pixels)


def _listed(folder: Path) -> list[Path]:
    """Image files at any depth, in the order of their names; hidden ones (thumbnails, resource forks) are not meant."""
    found = (f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    return sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts))


def _captions(folder: Path, files: list[Path], needed: bool) -> list[str]:
    """One caption an image, from metadata.jsonl, else from the .txt beside it."""
    written = {}
    if (folder / METADATA).exists():
        for number, record in read_jsonl(folder / METADATA):
            where = f"{folder / METADATA}, line {number}"
            if not isinstance(record.get("file_name"), str):
                raise ValueError(f'{where} names no file; write {{"file_name": "a.png", "text": "..."}}')
            written[Path(record["file_name"]).as_posix()] = prompt_of(record, where)

    def caption(file: Path) -> str:
        text = written.get(file.relative_to(folder).as_posix())
        beside = file.with_suffix(".txt")
        if text is None and beside.exists():
            text = read_text(beside)
        return " ".join((text or "").split())

    captions = [caption(file) for file in files]
    bare = [file for file, text in zip(files, captions, strict=True) if not text]
    if bare and needed:
        raise ValueError(
            f"{len(bare)} of the {len(files)} images in {folder} have no caption (first: {bare[0]}); "
            f"write {bare[0].with_suffix('.txt').name} beside it, or list it in {METADATA}"
        )
    return captions


def _digests(files: list[Path]) -> list[str]:
    """The hash of each file's bytes."""

    def one(file: Path) -> str:
        with file.open("rb") as raw:
            return hashlib.file_digest(raw, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, files))


def _joint(digests: list[str]) -> str:
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def _sizes(files: list[Path]) -> Tensor:
    """(height, width) of every file as decoded, (n, 2); zeros for one that does not decode."""

    def one(file: Path) -> tuple[int, int]:
        raw = file.read_bytes()  # outside: a file that may not be read is not a damaged image
        try:
            width, height = decode(raw).size
        except _DAMAGE:
            return 0, 0
        return height, width

    with ThreadPoolExecutor() as pool:
        return torch.tensor(list(pool.map(one, files)))
