"""What samples are compared with: images, their features and moments, cached in the process and on disk."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from fewstep.evaluation.features import Extractor
from fewstep.evaluation.frechet import Moments
from fewstep.evaluation.images import BATCH, digests, stream
from fewstep.progress import track
from fewstep.zoo import SOURCES


@dataclass(frozen=True)
class Reference:
    """Moments; and unless they came as an .npz, the features (N, d) float32 and image hashes (N,) uint64 behind them."""

    moments: Moments
    features: np.ndarray | None
    hashes: np.ndarray | None


def reference_images(source: str, n: int, seed: int) -> np.ndarray:
    """True images (n, H, W, 3) uint8: n drawings of a world of the zoo from a seed, or a folder's n first by name.

    Raises ValueError for a folder with fewer.
    """
    if source in SOURCES:
        from fewstep.zoo.sprites import draw

        return draw(seed, n, SOURCES[source])[0]
    found, held = [], 0
    for batch in stream(source):
        found.append(batch)
        held += len(batch)
        if held >= n:
            return np.concatenate(found)[:n]
    raise ValueError(f"{source} holds {held} images; the protocol wants {n}: lower its n or add images")


def extract(images: np.ndarray, extractor: Extractor) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, d) and hashes (N,) of images (N, H, W, 3); identical images get bitwise identical features."""
    hashes = digests(images)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return extractor(images[first])[inverse], hashes


@lru_cache(maxsize=4)
def load_reference(
    source: str,
    *,
    n: int,
    seed: int,
    extractor: Extractor,
    size: int | None = None,
    cache: str | None = None,
    key: str = "",
) -> Reference:
    """The reference of a protocol: a world of the zoo (n drawings from a seed), a folder (all of it) or an .npz of moments.

    size: the square that a folder's images are cut to. cache: a folder that keeps features and moments between processes, in
    files named by `key`; cached ones of another extractor or of other pictures are computed anew. Raises ValueError for an .npz
    of another extractor.
    """
    if source.endswith(".npz"):
        return Reference(Moments.load(source, extractor=extractor.id), None, None)
    if source not in SOURCES and not Path(source).is_dir():
        raise ValueError(
            f"the reference {source!r} is neither {', '.join(SOURCES)}, nor a folder of images, nor an .npz of moments"
        )
    batches = partial(stream, source, size) if source not in SOURCES else lambda: [reference_images(source, n, seed)]
    hashes = np.concatenate([digests(batch) for batch in batches()])
    source_sha = hashlib.sha256(hashes.tobytes()).hexdigest()
    kept = Path(cache) / f"reference-{key}.safetensors" if cache else None
    features = _kept(kept, extractor.id, source_sha) if kept else None
    if features is None:
        told = track(batches(), f"features of {source}", len(hashes), each=BATCH, active=source not in SOURCES)
        features = np.concatenate([extract(batch, extractor)[0] for batch in told])
        if kept:
            _keep(kept, features, extractor.id, source_sha)
    moments = Moments.of(features, extractor=extractor.id, source=source_sha)
    if kept:
        moments.save(kept.with_suffix(".npz"))
    return Reference(moments, features, hashes)


def _kept(file: Path, extractor: str, source: str) -> np.ndarray | None:
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return None
    try:
        with safe_open(file, "np") as held:
            return held.get_tensor("features") if held.metadata() == {"extractor": extractor, "source_sha256": source} else None
    except SafetensorError:  # a damaged cache is no cache
        return None


def _keep(file: Path, features: np.ndarray, extractor: str, source: str) -> None:
    from safetensors.numpy import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    save_file({"features": np.ascontiguousarray(features)}, part, {"extractor": extractor, "source_sha256": source})
    os.replace(part, file)
