"""What a teacher is, as a hash: the part of a cache's key that decides what its encodings and samples are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fewstep.adapters import Teacher

_ENCODERS = ("text_encoder", "tokenizer", "vae")  # components whose names start so decide what an encoding is


def fingerprint(teacher: Teacher, *more: str) -> str:
    """A hash of what decides the teacher's encodings: configs, tokenizers, and the weights of text encoders and VAE.

    more: further components whose weights count, as the network's do for a sample. Adapters on them do not."""
    encoders = {k: v for k, v in teacher.pipe.components.items() if k.startswith(_ENCODERS) and v is not None}
    parts = encoders | {k: teacher.pipe.components[k] for k in more}
    dtypes = {k: _dtypes(v) for k, v in parts.items() if isinstance(v, nn.Module)}
    setting = [*teacher.setting.size, teacher.setting.guidance]  # some conditions contain them
    found: dict[str, Any] = {"dtypes": dtypes, "setting": setting}
    folder = _local(teacher.path)
    if folder is not None:
        configs = [folder / "model_index.json", *folder.glob("*/config.json")]
        files = {*configs, *(f for name in parts for f in (folder / name).rglob("*") if f.is_file())}
        found |= {f.relative_to(folder).as_posix(): _sha256(f) for f in files}
    else:  # a hub id, or made in memory: no folder to read, so the loaded weights speak for themselves
        found |= {k: repr(v) for k, v in encoders.items()} | {k: repr(teacher.pipe.components[k].config) for k in more}
        found |= {f"{k} weights": _weights(v) for k, v in parts.items() if isinstance(v, nn.Module)}
    return hashlib.blake2b(json.dumps(found, sort_keys=True).encode(), digest_size=16).hexdigest()


def _dtypes(module: nn.Module) -> str:
    return ", ".join(sorted({str(p.dtype) for name, p in module.named_parameters() if ".lora_" not in name}))


def _local(path: str) -> Path | None:
    from fewstep.adapters import teacher_folder

    return teacher_folder(path) if path.startswith("zoo:") or Path(path).is_dir() else None


def _sha256(file: Path) -> str:
    state = file.stat()
    return _hashed(file, state.st_mtime_ns, state.st_size)


@cache
def _hashed(file: Path, changed: int, size: int) -> str:
    """Weights are gigabytes, and a run asks for the same files as its teacher's, its encodings' and its samples'."""
    with file.open("rb") as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()


def _weights(module: nn.Module) -> str:
    own = {name: tensor for name, tensor in module.state_dict().items() if ".lora_" not in name}
    return digest({name.replace(".base_layer.", "."): tensor for name, tensor in own.items()})


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of named tensors, of their bytes and dtypes, in their order."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
