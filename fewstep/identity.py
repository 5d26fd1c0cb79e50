"""What a run learns from, and by whom it is taught, as hashes that its checkpoints keep, so that it goes on with nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fewstep import checkpoint
from fewstep.adapters import Teacher
from fewstep.data import Buckets, Source, fingerprint
from fewstep.folders import teacher_folder


def content(source: Source | Buckets, before: Path | None = None) -> str:
    """A hash of the prompts (or captions), pictures and shapes of a run's rows, in order; the same in every process.

    before: the checkpoint to go on from. Raises ValueError where it learned from others; one that does not say passes."""
    parts = source.sources if isinstance(source, Buckets) else (source,)
    said = [[list(part.shape), part.prompts, part.pictures] for part in parts]
    now = hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()
    if before is not None and checkpoint.inspect(before).get("data", now) != now:
        raise ValueError(
            f"the data have changed since {before} was written; put back what they were, or start a new run in another --out"
        )
    return now


def taught(teacher: Teacher, guidance: float, path: str, before: Path | None = None) -> dict[str, str]:
    """The teacher's path, and a hash of all that decides its encodings and its predictions; of a hub id its name alone.

    before: the newest checkpoint that is said to be of this teacher. Raises ValueError where it was another one, elsewhere; one
    that does not say passes."""
    known = path
    if teacher_folder(path) is not None:
        said = [fingerprint(teacher, *teacher.components), f"{teacher.schedule} {teacher.target}", guidance]
        known = hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()
    now = {"path": path, "known": known}
    was = now if before is None else checkpoint.inspect(before).get("teacher", now)
    if was["path"] != path and was["known"] != known:
        raise ValueError(
            f"the teacher at {path} is not the one that {before} was taught by, which was at {was['path']}; "
            "name that one's place, or start a new run in another --out"
        )
    return now
