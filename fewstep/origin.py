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
    """The commit of fewstep's own checkout when this process first asked, "+" behind it if files were changed; None elsewhere."""
    # The last fails where this file only lies in somebody else's checkout, as in a virtual environment.
    questions = ["rev-parse HEAD", "status --porcelain --untracked-files=no", f"ls-files --error-unmatch {Path(__file__).name}"]
    try:
        commit, changed, _ = (
            subprocess.run(
                ["git", *asked.split()], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
            )
            for asked in questions
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
