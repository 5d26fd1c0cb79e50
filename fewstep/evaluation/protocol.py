"""Protocols: what is measured, on what, with what, under one hash; and the row of numbers that one gives."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fewstep.evaluation.clip_score import ClipScore
from fewstep.evaluation.features import Extractor, clip_source, resolve
from fewstep.evaluation.frechet import Moments, frechet_distance
from fewstep.evaluation.images import check
from fewstep.evaluation.kernel import kid
from fewstep.evaluation.neighbours import prdc
from fewstep.evaluation.reference import ZOO, Reference, extract, load_reference, reference_images
from fewstep.hints import hint

SHIPPED = Path(__file__).parent / "protocols"
PLACES = (Path("eval/protocols"), Path(__file__).parents[2] / "eval" / "protocols", SHIPPED)


class Protocol(BaseModel):
    """How samples are judged. Two rows compare if and only if the hashes of their protocols agree."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    prompts: str  # zoo:sprites, or a text file with one prompt a line
    n: Annotated[int, Field(ge=8)]
    seed: int
    extractor: str  # zoo:NAME, open_clip:FOLDER, open_clip:ARCHITECTURE:WEIGHTS, inception:WEIGHTS
    clip: str | None = None  # as above, or no CLIP score
    reference: str  # zoo:sprites, a folder, or an .npz of moments
    accuracy: bool = False  # attribute accuracy, for the sprites world alone
    kid_subsets: Annotated[int, Field(ge=2)] = 100
    kid_size: Annotated[int, Field(ge=2)] = 1000
    neighbours: Annotated[int, Field(ge=1)] = 5
    batch: Annotated[int, Field(ge=1)] = 64  # memory alone: not in the hash

    @property
    def hash(self) -> str:
        """First 16 hex digits of the sha256 of everything that can move a number, as canonical JSON."""
        content = self.model_dump(mode="json", exclude={"batch"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


class _Strict(yaml.SafeLoader):
    """YAML in which a key may be given once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := {k for k in keys if keys.count(k) > 1}:
            raise ValueError(f"key {sorted(twice)[0]!r} is given twice; keep one")
        return super().construct_mapping(node, deep)


def load_protocol(name_or_file: str | Path) -> Protocol:
    """A protocol by name (eval/protocols, then those shipped with fewstep) or from a YAML file.

    Raises ValueError for an unknown name or key (with the nearest one) and for a value of the wrong kind.
    """
    file = _find(str(name_or_file))
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Strict)  # a SafeLoader
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a protocol is a mapping of {', '.join(Protocol.model_fields)}")
    for key in content:
        if key not in Protocol.model_fields:
            known = f"; the keys are {', '.join(Protocol.model_fields)}"
            raise ValueError(f"{file}: unknown key {key!r}{hint(str(key), Protocol.model_fields) or known}")
    try:
        return Protocol(**content)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
        raise ValueError(f"{file}: {faults}") from error


def _find(name: str) -> Path:
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise ValueError(f"there is no protocol file {name}")
        return Path(name)
    for place in PLACES:
        if (place / f"{name}.yaml").is_file():
            return place / f"{name}.yaml"
    names = sorted({f.stem for place in PLACES if place.is_dir() for f in place.glob("*.yaml")})
    known = f"; there are {', '.join(names)}"
    raise ValueError(f"unknown protocol {name!r}{hint(name, names) or known}")


def load_prompts(protocol: Protocol) -> list[str]:
    """The n prompts that samples are drawn for, in order. Raises ValueError if their file has fewer lines."""
    if protocol.prompts == ZOO:
        from fewstep.zoo.sprites import captions

        return captions(protocol.seed, protocol.n)
    if not Path(protocol.prompts).is_file():
        raise ValueError(f"the prompts {protocol.prompts!r} of protocol {protocol.name!r} are neither {ZOO} nor a text file")
    lines = [s for line in Path(protocol.prompts).read_text(encoding="utf-8").splitlines() if (s := line.strip())]
    if len(lines) < protocol.n:
        raise ValueError(
            f"{protocol.prompts} has {len(lines)} prompts; protocol {protocol.name!r} wants {protocol.n}: lower its n"
        )
    return lines[: protocol.n]


@lru_cache(maxsize=2)
def _extractor(name: str, batch: int) -> Extractor:
    return resolve(name, batch=batch)


@lru_cache(maxsize=2)
def _clip(name: str, batch: int) -> ClipScore:
    return ClipScore(*clip_source(name), batch=batch)


def _reference(protocol: Protocol, cache: str | Path | None) -> Reference:
    # Another seed than the prompts': samples answer `seed`, so that the floor is what a perfect model would score.
    return load_reference(
        protocol.reference,
        n=protocol.n,
        seed=protocol.seed + 1,
        extractor=_extractor(protocol.extractor, protocol.batch),
        cache=str(cache) if cache else None,
        key=protocol.hash,
    )


def describe(protocol: Protocol, *, cache: str | Path | None = None) -> dict[str, Any]:
    """The `protocol` entry of results.json: its fields and hash, and what they stood for here.

    Names may come to mean other files: ids of extractor and CLIP model, and hashes of reference and prompts, are what was used.
    """
    prompts = "\n".join(load_prompts(protocol)).encode()
    return {
        **protocol.model_dump(mode="json"),
        "hash": protocol.hash,
        "extractor_id": _extractor(protocol.extractor, protocol.batch).id,
        "clip_id": _clip(protocol.clip, protocol.batch).id if protocol.clip else None,
        "reference_sha256": _reference(protocol, cache).moments.source,
        "prompts_sha256": hashlib.sha256(prompts).hexdigest(),
    }


def judge(
    images: np.ndarray, prompts: Sequence[str], protocol: Protocol, *, cache: str | Path | None = None
) -> dict[str, float | int]:
    """The row of a set of samples: images (n, H, W, 3) uint8 and the prompt of each.

    Keys: n, fd; where the reference has images kid, kid_stderr, precision, recall, density, coverage; where the protocol says so
    clip and accuracy; pixel_mean and pixel_std in [0, 255], saturated and duplicates as shares.
    cache: a folder that keeps reference features. Raises ValueError unless there are exactly protocol.n of both.
    """
    check(images)
    if not len(images) == len(prompts) == protocol.n:
        raise ValueError(
            f"protocol {protocol.name!r} judges {protocol.n} samples, not {len(images)} images with {len(prompts)} prompts"
        )
    extractor, reference = _extractor(protocol.extractor, protocol.batch), _reference(protocol, cache)
    features, hashes = extract(images, extractor)
    row: dict[str, float | int] = {"n": len(images)}
    row["fd"] = frechet_distance(reference.moments, Moments.of(features, extractor=extractor.id))
    if reference.features is not None and reference.hashes is not None:
        row["kid"], row["kid_stderr"] = kid(
            reference.features, features, subsets=protocol.kid_subsets, size=protocol.kid_size, seed=protocol.seed
        )
        even = min(len(reference.features), len(features))
        rng = np.random.default_rng(protocol.seed)
        real, fake = (x[np.sort(rng.permutation(len(x))[:even])] for x in (reference.features, features))
        row |= prdc(real, fake, k=protocol.neighbours)
        if shared := np.isin(hashes, reference.hashes).sum():
            warnings.warn(f"{shared} of {len(images)} images are in the reference itself: the scores flatter them", stacklevel=2)
    if protocol.clip:
        row["clip"] = float(_clip(protocol.clip, protocol.batch).score(images, prompts).mean(dtype=np.float64))
    if protocol.accuracy:
        from fewstep.zoo.reading import accuracy
        from fewstep.zoo.sprites import parse

        scores = accuracy(list(prompts), images)
        row["accuracy"] = float(scores.mean())
        alone = np.array([len(parse(p).nouns) == 1 for p in prompts])
        if alone.any():
            row["accuracy_one"] = float(scores[alone].mean())  # captions of a single sprite
    row["saturated"] = float(((images == 0) | (images == 255)).mean())
    row["pixel_mean"] = float(images.mean(dtype=np.float64))
    row["pixel_std"] = float(images.std(dtype=np.float64))
    row["duplicates"] = 1 - len(np.unique(hashes)) / len(hashes)
    return row


def floor(protocol: Protocol, *, cache: str | Path | None = None) -> float:
    """The Frechet distance of true drawings under this very protocol: no model can be expected to score less.

    Raises ValueError unless the reference is 'zoo:sprites', which alone can be drawn again.
    """
    if protocol.reference != ZOO:
        raise ValueError(f"only {ZOO} can be drawn again; for another reference, hold out some of its images and judge them")
    extractor = _extractor(protocol.extractor, protocol.batch)
    features, _ = extract(reference_images(ZOO, protocol.n, protocol.seed), extractor)
    return frechet_distance(_reference(protocol, cache).moments, Moments.of(features, extractor=extractor.id))
