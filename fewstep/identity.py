"""What a run learns from, as a hash that its checkpoints keep, so that it goes on with nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fewstep import checkpoint
from fewstep.data import Buckets, Source


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
