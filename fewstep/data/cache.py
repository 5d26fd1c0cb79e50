"""Tensors that are costly to make, kept on disk under the hash of what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def default_cache() -> Path:
    """$FEWSTEP_CACHE, or ~/.cache/fewstep."""
    return Path(os.environ.get("FEWSTEP_CACHE") or "~/.cache/fewstep").expanduser()


def cached(folder: Path | None, key: dict[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make()` gives, on the CPU: from `folder` if it was made there before with the same key, else made and stored.

    key: whatever determines the result, as JSON. folder None: no disk. A damaged file is made again, and a folder that
    cannot be written to only costs the storing: both with a warning."""
    if folder is None:
        return _plain(make())
    text = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    file = folder / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.safetensors"
    if file.exists():
        try:
            return _load(file, text)
        except (OSError, ValueError, SafetensorError) as error:
            warnings.warn(f"{file} is damaged and made again ({error})", stacklevel=2)
    tensors = _plain(make())
    try:
        _store(file, text, tensors)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"{file} could not be written ({error}); set FEWSTEP_CACHE to a folder with room", stacklevel=2)
    return tensors


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), total))
    return f"{total:08x}"


def _load(file: Path, text: str) -> dict[str, Tensor]:
    with safe_open(file, "pt") as stored:
        about = stored.metadata() or {}
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (it is no dict)
    if about.get("key") != text:
        raise ValueError("it was made from another key")
    if about.get("crc32") != _checksum(tensors):
        raise ValueError("its checksum is wrong")
    return tensors


def _store(file: Path, text: str, tensors: dict[str, Tensor]) -> None:
    """Writes beside `file` and renames: a kill at any instant leaves no half a file under its name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.stem}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(tensors, beside, metadata={"key": text, "crc32": _checksum(tensors)})
        beside.chmod(file.parent.stat().st_mode & 0o666)  # safetensors makes it the owner's alone; a cache may be shared
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
