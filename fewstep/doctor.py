"""What this machine has."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Check:
    """One line of the table: what, whether it is well, what was found, and how to mend it."""

    name: str
    ok: bool
    value: str
    fix: str = ""


def examine() -> list[Check]:
    """Python, packages, device, precision, attention backends, disk."""
    import torch

    cuda = torch.cuda.is_available()
    found = [Check("python", True, platform.python_version())]
    for name in ("torch", "diffusers", "transformers", "peft", "accelerate", "open_clip_torch", "torchmetrics"):
        found.append(_package(name))
    where = torch.cuda.get_device_name() if cuda else f"none; {os.cpu_count()} CPU cores"
    found.append(Check("gpu", cuda, where, "" if cuda else "training runs on the CPU; small teachers such as the zoo's only"))
    half = torch.cuda.is_bf16_supported() if cuda else True
    found.append(Check("bfloat16", half, "yes" if half else "no", "" if half else "set train.dtype: float32"))
    found.append(Check("attention sdpa", True, "always"))
    for name, package in (("xformers", "xformers"), ("flash", "flash_attn")):
        there = importlib.util.find_spec(package) is not None
        found.append(
            Check(
                f"attention {name}",
                there,
                "installed" if there else "absent",
                "" if there else f"optional: pip install {package}",
            )
        )
    free = shutil.disk_usage(".").free / 2**30
    found.append(Check("disk", free > 5, f"{free:.0f} GiB free", "" if free > 5 else "checkpoints of a large teacher need more"))
    return found


def _package(name: str) -> Check:
    try:
        return Check(name, True, version(name))
    except PackageNotFoundError:
        return Check(name, False, "absent", f"pip install {name}")
