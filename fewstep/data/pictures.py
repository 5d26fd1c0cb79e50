"""One picture, wherever its bytes lie: how they become pixels."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
OTHER = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2")  # pictures that are not read
# What Pillow raises for bytes that are no image, or half of one; the last four for metadata that make no sense.
DAMAGE: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
DAMAGE += (TypeError, AttributeError, LookupError, ArithmeticError)


class Picture(Protocol):
    """Bytes with a name for messages, str(picture): a Path, a member of a shard, a cell of a table."""

    def read_bytes(self) -> bytes: ...


def listed(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files of some suffixes at any depth, in the order of their names; hidden ones (thumbnails, forks) are not meant."""
    found = (f for f in folder.rglob("*") if f.suffix.lower() in suffixes and f.is_file())
    return sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts))


def unread(folder: Path) -> str:
    """What is said of pictures in a folder that are of formats which are not read, or ""."""
    other = listed(folder, OTHER)
    return f"{len(other)} files of {folder} are no PNG, JPEG or WebP ({other[0].name})" if other else ""


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


def nearest(size: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> int:
    """Which of the shapes a picture loses least in; all are (height, width)."""
    off = [abs(math.log(height * size[1] / (width * size[0]))) for height, width in shapes]
    return off.index(min(off))
