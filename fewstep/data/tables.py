"""Captioned images in parquet files, as Hugging Face datasets keep them: a column of encoded images and one of captions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from fewstep.data.prompts import NAMES, prompt_of

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")  # what a column of images may be called, where there are several
REMEDY = f"give the table a column of text named one of {', '.join(map(repr, NAMES))}"
# Encoded images: bytes, or what datasets' Image feature is stored as.
_IMAGES = re.compile(r"(large_)?binary|struct<.*\bbytes: (large_)?binary\b.*>")

_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
_PART = re.compile(r"(.+)-\d{5}-of-\d{5}")  # what datasets calls a file of several


def one_split(folder: Path, files: list[Path]) -> None:
    """Raises ValueError where the files of a folder are of several splits: train-00000-of-00003.parquet, train.parquet, or any
    files below train/, such as train/data-00000-of-00003.parquet and default/train/0000.parquet."""
    splits = {name: where for file in files for name, where in [_split(folder, file)] if name}
    if len(splits) > 1:
        some = splits["train" if "train" in splits else min(splits)]
        raise ValueError(f"{folder} holds the splits {', '.join(sorted(splits))}; name one, as in {some}")


def _split(folder: Path, file: Path) -> tuple[str, Path]:
    """The split that a file is of ("" if its name does not say), and how to name that split's files."""
    part = _PART.fullmatch(file.stem)
    above = next((p for p in file.parents if p.is_relative_to(folder) and p != folder and p.name in _SPLITS), None)
    if part and (part[1] in _SPLITS or above is None):
        return part[1], file.with_name(f"{part[1]}-*.parquet")
    if file.stem in _SPLITS:
        return file.stem, file
    return ("", file) if above is None else (above.name, above)


class Groups:
    """Row groups of images. The last one read is kept: rows are asked for in order, and a group is decompressed as a whole."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._held: tuple[Path, str, int] | None = None
        self._images: list[bytes] = []

    def read(self, file: Path, column: str, group: int) -> list[bytes]:
        """The encoded images of one group, b"" where there is none. Raises ValueError for a group that is damaged."""
        with self._lock:
            if self._held != (file, column, group):
                rows = _rows(file, _open(file), group, column)
                cells = (cell.get("bytes") if isinstance(cell, dict) else cell for cell in (row[column] for row in rows))
                self._held, self._images = (file, column, group), [cell or b"" for cell in cells]
            return self._images


@dataclass(frozen=True)
class Cell:
    """The image in one row of a parquet file; number counts the file's rows from 0, row those of the group."""

    file: Path
    column: str
    group: int
    row: int
    number: int
    groups: Groups = field(compare=False, repr=False)

    def read_bytes(self) -> bytes:
        return self.groups.read(self.file, self.column, self.group)[self.row]

    def __str__(self) -> str:
        return f"row {self.number} of {self.file}"


def read_tables(files: list[Path]) -> list[tuple[Cell, str]]:
    """Each row's image and its caption ("" where it has none), in the files' order. Needs pyarrow.

    Raises ValueError for a file that is no parquet, and for one without a column of images."""
    groups = Groups()
    return [sample for file in files for sample in _samples(file, groups)]


def _samples(file: Path, groups: Groups) -> list[tuple[Cell, str]]:
    table = _open(file)
    column = _image_column(file, {f.name: str(f.type) for f in table.schema_arrow})
    text = next((name for name in NAMES if name in table.schema_arrow.names), None)
    samples: list[tuple[Cell, str]] = []
    for group in range(table.num_row_groups):
        n = table.metadata.row_group(group).num_rows
        rows = _rows(file, table, group, text) if text else [{}] * n
        for row, record in enumerate(rows):
            cell = Cell(file, column, group, row, len(samples), groups)
            known = {name: value for name, value in record.items() if value is not None}
            samples.append((cell, prompt_of(known, str(cell)) if known else ""))
    return samples


def _image_column(file: Path, types: dict[str, str]) -> str:
    fitting = [name for name, kind in types.items() if _IMAGES.fullmatch(kind)]
    named = [name for name in IMAGE_NAMES if name in fitting]
    if len(fitting) == 1 or named:
        return (named or fitting)[0]
    has = "several columns" if fitting else "no column"
    raise ValueError(
        f"{file} has {has} of encoded images (it has {', '.join(f'{k!r}: {v}' for k, v in types.items())}); "
        "name the one to learn from 'image'"
    )


def _open(file: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{file} needs pyarrow to be read; install it (pip install pyarrow)") from error
    try:
        return parquet.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file} is no whole parquet file ({error}); copy it again") from error


def _rows(file: Path, table: Any, group: int, column: str) -> list[dict[str, Any]]:
    from pyarrow import ArrowException

    try:
        return table.read_row_group(group, columns=[column]).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"row group {group} of {file} cannot be read ({error}); copy the file again") from error
