"""Folders written aside and put in their place by renaming: what lies there is always whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written(to: Path) -> Iterator[Path]:
    """An empty folder beside `to`, which takes its place when the block ends, and is gone where the block raises."""
    part = to.with_name(f".{to.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(_old(to), ignore_errors=True)
        if to.exists():
            to.rename(_old(to))
        part.rename(to)
        shutil.rmtree(_old(to), ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def restore(to: Path) -> None:
    """Undoes a `written` that was killed between its two renames."""
    if _old(to).exists() and not to.exists():
        _old(to).rename(to)


def files_of(folder: Path) -> set[str]:
    """Everything in a folder, at any depth, but folders and Python's bytecode; nothing where there is no folder."""
    found = (f for f in folder.rglob("*") if f.is_symlink() or not f.is_dir())
    return {f.relative_to(folder).as_posix() for f in found if "__pycache__" not in f.parts}


def _old(to: Path) -> Path:
    return to.with_name(f".{to.name}.old")
