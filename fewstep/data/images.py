"""Captioned images from a folder, webdataset shards, parquet files, or the embedded world."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.data import shards, tables
from fewstep.data.cache import cached
from fewstep.data.pictures import DAMAGE, SUFFIXES, Picture, decode, fit, listed, nearest, unread
from fewstep.data.prompts import prompt_of, read_jsonl, read_text

METADATA = "metadata.jsonl"
READ_CHUNK = 64  # images whose bytes are in memory at once
NAMED = 3  # images that a message names
ZOO_SEED, ZOO_CHUNK, ZOO_COUNT = 60_000, 4096, 8192


@dataclass(frozen=True)
class ImageSet:
    """Captioned images that are known to decode: files (or places in them), or pixels (N, H, W, 3) uint8.

    digest: hash of their content, in order; of files, digests holds each one's and sizes its (height, width)."""

    captions: tuple[str, ...]
    digest: str
    files: tuple[Picture, ...] = ()
    digests: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def rows_nearest(self, shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
        """For each of the shapes (height, width), the images that lose least in it."""
        found: list[list[int]] = [[] for _ in shapes]
        for i in range(len(self)):
            found[nearest(self.sizes[i] if self.pixels is None else self.pixels.shape[1:3], shapes)].append(i)
        return found

    def part(self, rows: Sequence[int]) -> ImageSet:
        """Some of the images, in order; all of them are this very set."""
        if len(rows) == len(self):
            return self
        assert self.pixels is None  # these are of one shape
        digests = tuple(self.digests[i] for i in rows)
        return ImageSet(
            tuple(self.captions[i] for i in rows),
            _joint(digests),
            tuple(self.files[i] for i in rows),
            digests,
            tuple(self.sizes[i] for i in rows),
        )

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
            except DAMAGE as error:
                raise ValueError(f"{self.files[index]} can no longer be read ({error}); start again") from error

        with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
            return np.stack(list(pool.map(one, indices)))


def read_images(source: str, *shapes: tuple[int, int], captioned: bool = True, cache: Path | None = None) -> ImageSet:
    """The images of a world of the zoo, of a folder (png, jpg, webp, captioned in metadata.jsonl or by a .txt beside each), of
    webdataset shards (.tar) or of parquet files: a folder of them, one, or a pattern such as data/train-*.parquet.

    Every image is decoded once; those that cannot be are left out with a warning. shapes: the (height, width) that all are to be
    cut to, or several, of which each gets the nearest; smaller images bring a warning. captioned False: a missing caption is "".
    cache: where to keep what was learned of them; the same images in the same order are the same set, however they are stored.
    Raises ValueError for a source without images, or captions, and for one of which more than half cannot be decoded."""
    if source.startswith("zoo:"):
        return _drawn(source, cache)
    found, remedy = _found(source)
    files = [file for file, _ in found]
    captions = [" ".join(text.split()) for _, text in found]
    bare = [file for file, text in zip(files, captions, strict=True) if not text]
    if bare and captioned:
        said = f"{len(bare)} of the {len(files)} images in {source} have no caption (first: {bare[0]})"
        raise ValueError(f"{said}; {remedy}")
    if not files:
        arrow = next(Path(source).expanduser().rglob("*.arrow"), None)
        instead = "" if arrow is None else f"; {arrow.name} is of save_to_disk: write it with dataset.to_parquet('train.parquet')"
        said = f"{source} holds no images; put {', '.join(SUFFIXES)} files there, .tar shards or .parquet files{instead}"
        raise ValueError(said)
    digests, sizes = _measured(files, cache)
    kept = [i for i, size in enumerate(sizes.tolist()) if min(size) > 0]
    bad = [file for file, size in zip(files, sizes.tolist(), strict=True) if min(size) == 0]
    if bad:
        said = f"{len(bad)} of the {len(files)} images in {source} cannot be read"
        first = f"(first: {', '.join(map(str, bad[:NAMED]))})"
        if len(bad) > len(kept):
            raise ValueError(f"{said} {first}: more than half, so something made them wrong; save them again as PNG or JPEG")
        warnings.warn(f"{said} and are left out {first}; save them again or delete them", stacklevel=2)
    every = ImageSet(tuple(captions), _joint(digests), tuple(files), tuple(digests), tuple((h, w) for h, w in sizes.tolist()))
    images = every.part(kept)
    placed = [(i, h, w) for (h, w), rows in zip(shapes, images.rows_nearest(shapes), strict=True) for i in rows]
    small = sorted((i, h, w) for i, h, w in placed if images.sizes[i][0] < h or images.sizes[i][1] < w)
    if small:
        i, h, w = small[0]
        than = f"{h}x{w}" if len(shapes) == 1 else f"the shape they get, here {h}x{w},"
        said = f"{len(small)} of the {len(images)} images in {source} are smaller than {than} and are enlarged"
        said += f" (first: {images.files[i]}); larger ones give a sharper student"
        warnings.warn(said, stacklevel=2)
    return images


def _drawn(source: str, cache: Path | None) -> ImageSet:
    from fewstep.zoo import sprites
    from fewstep.zoo import world as named

    world = named(source, "images")
    seeds = [ZOO_SEED + i for i in range(ZOO_COUNT // ZOO_CHUNK)]
    program = hashlib.blake2b(inspect.getsource(sprites).encode(), digest_size=16).hexdigest()
    known = {"kind": world, "version": 1, "program": program, "seeds": seeds, "chunk": ZOO_CHUNK}

    def draw() -> dict[str, Tensor]:
        return {"pixels": torch.cat([torch.from_numpy(sprites.draw(seed, ZOO_CHUNK, world)[0]) for seed in seeds])}

    pixels = cached(cache, known, draw)["pixels"].numpy()
    captions = tuple(caption for seed in seeds for caption in sprites.captions(seed, ZOO_CHUNK, world))
    return ImageSet(captions, hashlib.blake2b(pixels.data, digest_size=16).hexdigest(), pixels=pixels)


def _found(source: str) -> tuple[Sequence[tuple[Picture, str]], str]:
    """The images at a path with their captions ("" where there is none), and how to caption the rest."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = listed(path, (*SUFFIXES, ".tar", ".parquet"))
    elif path.suffix.lower() in (".tar", ".parquet"):
        files = [path] if path.is_file() else sorted(Path(file) for file in glob(str(path), recursive=True))
    else:
        files = []
    if not path.is_dir() and not files:
        raise ValueError(
            f"there are no images at {source}; give a folder with captions, .tar or .parquet files (as in data/*.tar), "
            "or zoo:sprites"
        )
    loose, tars, parquet = ([f for f in files if f.suffix.lower() in ends] for ends in (SUFFIXES, (".tar",), (".parquet",)))
    if bool(loose) + bool(tars) + bool(parquet) > 1:
        counts = f"{len(loose)} images, {len(tars)} .tar and {len(parquet)} .parquet files"
        raise ValueError(
            f"{source} holds {counts}; say which, as in {source}/*.parquet, or move the images to a folder of their own"
        )
    if path.is_dir():
        tables.one_split(path, parquet)
    if tars:
        return shards.read_shards(tars), shards.REMEDY
    if parquet:
        return tables.read_tables(parquet), tables.REMEDY
    return _captioned(path, loose), f"write a .txt of the same name beside it, or list it in {METADATA}"


def _captioned(folder: Path, files: list[Path]) -> list[tuple[Path, str]]:
    """Each image with its caption, from metadata.jsonl, else from the .txt beside it. Warns of images that are not read and of
    lines without one; raises ValueError where there are images, and none that is read."""
    if others := unread(folder):
        if not files:
            raise ValueError(f"{others}; save them as PNG")
        warnings.warn(f"{others} and are left out; save them as PNG to have them read", stacklevel=4)
    written = {}
    if (folder / METADATA).exists():
        for number, record in read_jsonl(folder / METADATA):
            where = f"{folder / METADATA}, line {number}"
            if not isinstance(record.get("file_name"), str):
                raise ValueError(f'{where} names no file; write {{"file_name": "a.png", "text": "..."}}')
            written[Path(record["file_name"]).as_posix()] = prompt_of(record, where)
    here = {file.relative_to(folder).as_posix() for file in files}
    absent = [name for name in written if name not in here and not (folder / name).is_file()]
    if absent:
        said = f"{len(absent)} of the {len(written)} files that {folder / METADATA} names are not there (first: {absent[0]})"
        warnings.warn(f"{said} and are left out; mend those lines or remove them", stacklevel=4)

    def caption(file: Path) -> str:
        text = written.get(file.relative_to(folder).as_posix())
        beside = file.with_suffix(".txt")
        if text is None and beside.exists():
            text = read_text(beside)
        return text or ""

    return [(file, caption(file)) for file in files]


def _joint(digests: Sequence[str]) -> str:
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def _measured(files: Sequence[Picture], cache: Path | None) -> tuple[list[str], Tensor]:
    """The hash of each image's bytes, and its (height, width) as decoded, (n, 2), zeros where it does not decode.

    Every file is read once, and decoded from the bytes at hand where `cache` does not know them."""
    digests: list[str] = []
    sizes: list[Tensor] = []
    with ThreadPoolExecutor() as pool:  # hashing and decoding release the interpreter lock
        for start in range(0, len(files), READ_CHUNK):
            raws = list(pool.map(lambda file: file.read_bytes(), files[start : start + READ_CHUNK]))
            digests += pool.map(lambda raw: hashlib.blake2b(raw, digest_size=16).hexdigest(), raws)
            known = {"kind": "sizes", "version": 1, "files": _joint(digests[start:])}
            sizes.append(cached(cache, known, partial(_sizes, raws, pool))["sizes"])
    return digests, torch.cat(sizes)


def _sizes(raws: list[bytes], pool: ThreadPoolExecutor) -> dict[str, Tensor]:
    def one(raw: bytes) -> tuple[int, int]:
        try:
            width, height = decode(raw).size
        except DAMAGE:
            return 0, 0
        return height, width

    return {"sizes": torch.tensor(list(pool.map(one, raws)))}
