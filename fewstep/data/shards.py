"""Captioned images in webdataset shards: .tar files whose members of one key are one sample. Nothing is extracted."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fewstep.data.pictures import SUFFIXES
from fewstep.data.prompts import NAMES, prompt_of, read_text

REMEDY = f"add a .txt of the same key, or a .json with one of {', '.join(map(repr, NAMES))}"


@dataclass(frozen=True)
class Member:
    """One file inside a shard, read where it lies."""

    shard: Path
    name: str
    start: int
    size: int

    def read_bytes(self) -> bytes:
        with self.shard.open("rb") as raw:
            raw.seek(self.start)
            return raw.read(self.size)

    def __str__(self) -> str:
        return f"{self.name} in {self.shard}"


def read_shards(shards: list[Path]) -> list[tuple[Member, str]]:
    """Each sample's image and its caption ("" where it has none), in the shards' order.

    A sample is what shares a name up to the first dot of its last part: a.jpg with a.txt, or a.json. Samples without an image
    are passed over. Raises ValueError for a shard that is no whole plain tar, and for a sample with two images."""
    return [sample for shard in shards for sample in _samples(shard)]


def _samples(shard: Path) -> Iterator[tuple[Member, str]]:
    samples: dict[PurePosixPath, dict[str, Member]] = {}
    for member in _members(shard):
        path = PurePosixPath(member.name)
        if not any(part.startswith(".") for part in path.parts):  # hidden: thumbnails, resource forks
            stem, dot, ending = path.name.partition(".")
            parts = samples.setdefault(path.with_name(stem), {})
            kind = "image" if (dot + ending).lower() in SUFFIXES else (dot + ending).lower()
            if kind == "image" and kind in parts:
                raise ValueError(f"{member} has the key of {parts[kind].name}; give every image a key of its own")
            parts[kind] = member
    for parts in samples.values():
        if "image" in parts:
            yield parts["image"], _caption(parts)


def _caption(parts: dict[str, Member]) -> str:
    if ".txt" in parts:
        return read_text(parts[".txt"])
    if ".json" not in parts:
        return ""
    try:
        record = json.loads(read_text(parts[".json"]))
    except json.JSONDecodeError as error:
        raise ValueError(f"{parts['.json']} is not JSON ({error}); write one object") from error
    if not isinstance(record, dict):
        raise ValueError(f'{parts[".json"]} is not an object; write {{"caption": "..."}}')
    record = {name: value for name, value in record.items() if value is not None}
    return prompt_of(record, str(parts[".json"])) if any(name in record for name in NAMES) else ""


def _members(shard: Path) -> list[Member]:
    """The regular files of a shard: links and devices are not followed."""
    try:
        with shard.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            files = [m for m in tar if m.isreg() and not m.issparse()]
            raw.seek(tar.offset)  # tarfile takes a damaged header for the end, which is a block of zeros
            if raw.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is not a whole plain tar ({error}); copy it again, or decompress it (gunzip)") from error
    return [Member(shard, m.name, m.offset_data, m.size) for m in files]
