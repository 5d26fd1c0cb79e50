"""Which fewstep wrote a file, on what it stood: for the record."""

from __future__ import annotations

import importlib.metadata
import subprocess
from functools import cache
from pathlib import Path

from fewstep import __version__


@cache
def versions() -> dict[str, str]:
    """Of fewstep, torch and Diffusers; importing none of them."""
    return {"fewstep": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "diffusers")}}


@cache
def git_hash() -> str | None:
    """The commit of fewstep's own checkout when this process first asked; None where it was installed from a wheel."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        asked = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None
