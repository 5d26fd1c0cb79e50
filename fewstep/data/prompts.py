"""Prompts from a text, JSON lines or CSV file, or from the embedded world."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fewstep.data.pictures import Picture

NAMES = ("prompt", "caption", "text")  # what a field or a column of prompts may be called; the first found counts
ZOO_SEED, ZOO_COUNT = 50_000, 8192


def read_prompts(source: str) -> list[str]:
    """The prompts of a world of the zoo, or of a .txt (one a line), .jsonl or .csv file in UTF-8; blank ones are dropped.

    Raises ValueError, naming the line where there is one, for a file that cannot be read or holds none."""
    if source.startswith("zoo:"):
        from fewstep.zoo import world
        from fewstep.zoo.sprites import captions

        return captions(ZOO_SEED, ZOO_COUNT, world(source, "prompts"))
    file = Path(source).expanduser()
    if file.is_dir():
        raise ValueError(f"{source} is a folder; give a .txt, .jsonl or .csv file, or name it under data.images")
    if not file.exists():
        raise ValueError(f"there is no file of prompts at {source}; give a .txt, .jsonl or .csv file, or zoo:sprites")
    readers = {".txt": _lines, ".jsonl": _records, ".csv": _rows}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise ValueError(f"{source} ends in {file.suffix or 'no suffix'!r}; save prompts as .txt (one a line), .jsonl or .csv")
    prompts = [p for p in (prompt.strip() for prompt in reader(file)) if p]
    if not prompts:
        raise ValueError(f"{source} holds no prompts; write at least one")
    return prompts


def read_text(file: Picture) -> str:
    """The text of a UTF-8 file without its byte order mark. Raises ValueError where it is not UTF-8."""
    raw = file.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec drops a byte order mark before it counts.
        at = error.start + (len(raw) - len(error.object))
        line = raw.count(b"\n", 0, at) + 1
        raise ValueError(f"{file} is not UTF-8 (byte {at}, line {line}); save it as UTF-8") from error


def read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank. Raises ValueError for a line that is no JSON object."""
    for number, line in _numbered(file):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is not JSON ({error}); write one object a line") from error
        if not isinstance(record, dict):
            raise ValueError(f'{file}, line {number} is not an object; write {{"prompt": "..."}}')
        yield number, record


def prompt_of(record: Mapping[str, Any], where: str) -> str:
    """The prompt in a record. Raises ValueError, saying `where`, if it has none or one that is no text."""
    name = next((n for n in NAMES if n in record), None)
    if name is None:
        has = ", ".join(map(repr, record)) or "nothing"
        raise ValueError(f"{where} has none of {', '.join(map(repr, NAMES))} (it has {has}); rename the one with the prompts")
    if not isinstance(record[name], str):
        raise ValueError(f"{where}: {name!r} is {record[name]!r}, which is no text; write it in quotes")
    return record[name]


def _numbered(file: Path) -> Iterator[tuple[int, str]]:
    # Not str.splitlines: it also breaks at separators such as U+2028, which a prompt and a JSON string may contain.
    for number, line in enumerate(io.StringIO(read_text(file), newline=None), 1):
        if line.strip():
            yield number, line


def _lines(file: Path) -> Iterator[str]:
    for _, line in _numbered(file):
        yield line


def _records(file: Path) -> Iterator[str]:
    for number, record in read_jsonl(file):
        yield prompt_of(record, f"{file}, line {number}")


def _rows(file: Path) -> Iterator[str]:
    reader = csv.reader(io.StringIO(read_text(file), newline=""))
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if not header:
            return
        prompt_of(dict.fromkeys(header, ""), f"the header of {file}")
        for row in reader:
            if row:
                yield prompt_of(dict(zip(header, row, strict=False)), f"{file}, line {reader.line_num}")
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num} is not CSV ({error}); quote fields with commas or quotes") from error
