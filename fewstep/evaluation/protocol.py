"""Protocols: what is measured, on what, with what, under one hash; and the row of numbers that one gives."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
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
from fewstep.evaluation.reference import Reference, extract, load_reference, reference_images
from fewstep.hints import hint, read_yaml
from fewstep.zoo import SOURCES

SHIPPED = Path(__file__).parent / "protocols"
PLACES = (Path("eval/protocols"), Path(__file__).parents[2] / "eval" / "protocols", SHIPPED)
LEAST = 8  # pictures
OWN = "--protocol inception --reference FOLDER --prompts FILE judges against your own images"


class Protocol(BaseModel):
    """How samples are judged. Two rows compare if and only if the hashes of their protocols agree."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    # zoo:WORLD, a .txt, .jsonl or .csv file, or a folder of captioned images; a folder of samples is judged without
    prompts: str | None = None
    n: Annotated[int, Field(ge=LEAST)]
    seed: int = 0
    extractor: str = "inception"  # or inception:WEIGHTS, zoo:NAME, open_clip:FOLDER, open_clip:ARCHITECTURE:WEIGHTS
    clip: str | None = None  # an open_clip model as above, or no CLIP score
    reference: str  # zoo:WORLD, a folder, or an .npz of moments
    size: Annotated[int, Field(ge=8)] | None = None  # the square that a folder's images are cut to; as they are, if not given
    accuracy: bool = False  # attribute accuracy, for the worlds of the zoo alone
    kid_subsets: Annotated[int, Field(ge=2)] = 100
    kid_size: Annotated[int, Field(ge=2)] = 1000
    neighbours: Annotated[int, Field(ge=1)] = 5
    batch: Annotated[int, Field(ge=1)] = 64  # memory alone: not in the hash

    @property
    def hash(self) -> str:
        """First 16 hex digits of the sha256 of everything that can move a number, as canonical JSON."""
        unsaid = {"batch"} if self.size is not None else {"batch", "size"}  # older than the setting, hashes stay
        content = self.model_dump(mode="json", exclude=unsaid)
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def load_protocol(name_or_file: str | Path, given: Mapping[str, Any] | None = None) -> Protocol:
    """A protocol by name (eval/protocols, then those shipped with fewstep) or from a YAML file; what is given, and not
    None, goes over its keys.

    Raises ValueError for an unknown name or key (with the nearest one) and for a value of the wrong kind.
    """
    file = _find(str(name_or_file))
    try:
        content = read_yaml(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a protocol is a mapping of {', '.join(Protocol.model_fields)}")
    for key in content:
        if key not in Protocol.model_fields:
            known = f"; the keys are {', '.join(Protocol.model_fields)}"
            raise ValueError(f"{file}: unknown key {key!r}{hint(str(key), Protocol.model_fields) or known}")
    over = {k: str(v) if isinstance(v, Path) else v for k, v in (given or {}).items() if v is not None}
    try:
        return Protocol(**content | over)
    except ValidationError as error:
        if "reference" in {place for e in error.errors() if e["type"] == "missing" for place in e["loc"]}:
            given_as = "give --reference FOLDER (your images) and --prompts FILE, or write them into a copy of it"
            raise ValueError(f"{file} says no reference; {given_as}; for the zoo's, --protocol sprites") from error
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
        raise ValueError(f"{file}: {faults}") from error


def _find(name: str) -> Path:
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise ValueError(f"there is no protocol file {name}; write one with name, n, prompts and reference, or: {OWN}")
        return Path(name)
    for place in PLACES:
        if (place / f"{name}.yaml").is_file():
            return place / f"{name}.yaml"
    names = sorted({f.stem for place in PLACES if place.is_dir() for f in place.glob("*.yaml")})
    known = f"; there are {', '.join(names)}, or give a YAML file with name, n, prompts and reference"
    raise ValueError(f"unknown protocol {name!r}{hint(name, names) or known}")


def load_prompts(protocol: Protocol) -> list[str]:
    """The n prompts that samples are drawn for, in order. Raises ValueError for fewer, and as `check_captions` does."""
    if protocol.prompts is None:
        raise ValueError(f"protocol {protocol.name!r} says no prompts to draw for; give --prompts FILE, or write prompts: FILE")
    if protocol.prompts in SOURCES:
        from fewstep.zoo.sprites import captions

        return captions(protocol.seed, protocol.n, SOURCES[protocol.prompts])
    found = _read(protocol.prompts)
    if len(found) < protocol.n:
        raise ValueError(
            f"{protocol.prompts} has {len(found)} prompts, protocol {protocol.name!r} wants {protocol.n}; "
            f"add some, {judge_less(len(found))}"
        )
    check_captions(found[: protocol.n], protocol)
    return found[: protocol.n]


def judge_less(held: int) -> str:
    """What else can be done where a protocol wants more than there are."""
    return f"or judge by a lower n (--n {held})" if held >= LEAST else f"at least {LEAST} are needed"


@lru_cache(maxsize=2)
def _read(source: str) -> list[str]:
    from fewstep.data import default_cache, read_images, read_prompts

    if not Path(source).expanduser().is_dir():
        return read_prompts(source)
    return list(read_images(source, (1, 1), cache=default_cache()).captions)  # whatever their size


def check_captions(prompts: Sequence[str], protocol: Protocol) -> None:
    """Raises ValueError where a protocol scores accuracy and a prompt is no caption of the zoo's."""
    from fewstep.zoo.sprites import parse

    for number, prompt in enumerate(prompts if protocol.accuracy else (), 1):
        try:
            parse(prompt)
        except ValueError as error:
            raise ValueError(
                f"protocol {protocol.name!r} scores accuracy, which only captions of the zoo have, and prompt {number} is"
                f" {prompt[:60]!r}; set accuracy: false in it, or: {OWN}"
            ) from error


def check_size(images: np.ndarray, protocol: Protocol) -> None:
    """Raises ValueError where a protocol scores accuracy and pictures (N, H, W, 3) are not of the zoo's size."""
    from fewstep.zoo.sprites import SIDE

    height, width = images.shape[1:3]
    if protocol.accuracy and (height, width) != (SIDE, SIDE):
        raise ValueError(
            f"protocol {protocol.name!r} scores accuracy, which only the zoo's pictures of {SIDE}x{SIDE} have, and these are"
            f" {width}x{height}; set accuracy: false in it, or: {OWN}"
        )


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
        size=protocol.size,
        cache=str(cache) if cache else None,
        key=protocol.hash,
    )


def describe(protocol: Protocol, *, cache: str | Path | None = None) -> dict[str, Any]:
    """The `protocol` entry of results.json: its fields and hash, and what they stood for here.

    Names may come to mean other files: ids of extractor and CLIP model, and hashes of reference and prompts, are what was used.
    """
    return {
        **protocol.model_dump(mode="json"),
        "hash": protocol.hash,
        "extractor_id": _extractor(protocol.extractor, protocol.batch).id,
        "clip_id": _clip(protocol.clip, protocol.batch).id if protocol.clip else None,
        "reference_sha256": _reference(protocol, cache).moments.source,
        "prompts_sha256": prompts_sha(load_prompts(protocol)) if protocol.prompts else None,
    }


def prompts_sha(prompts: Sequence[str]) -> str:
    """The sha256 of prompts in their order."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def judge(
    images: np.ndarray, prompts: Sequence[str] | None, protocol: Protocol, *, cache: str | Path | None = None
) -> dict[str, float | int]:
    """The row of a set of samples: images (n, H, W, 3) uint8 and the prompt of each, or None where nobody knows them.

    Keys: n, fd; where the reference has images kid, kid_stderr, precision, recall, density, coverage; where the protocol says so
    and prompts are known clip and accuracy; pixel_mean and pixel_std in [0, 255], saturated and duplicates as shares.
    cache: a folder that keeps reference features. Raises ValueError unless there are exactly protocol.n of both.
    """
    check(images)
    if {len(images), len(images if prompts is None else prompts)} != {protocol.n}:
        said = "" if prompts is None else f" with {len(prompts)} prompts"
        raise ValueError(f"protocol {protocol.name!r} judges {protocol.n} samples, not {len(images)} images{said}")
    if prompts is not None:
        check_captions(prompts, protocol)
        check_size(images, protocol)
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
    if protocol.clip and prompts is not None:
        row["clip"] = float(_clip(protocol.clip, protocol.batch).score(images, prompts).mean(dtype=np.float64))
    if protocol.accuracy and prompts is not None:
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

    Raises ValueError unless the reference is a world of the zoo, which alone can be drawn again.
    """
    if protocol.reference not in SOURCES:
        raise ValueError(
            f"only {', '.join(SOURCES)} can be drawn again; for another reference, hold out some of its images and judge them"
        )
    extractor = _extractor(protocol.extractor, protocol.batch)
    features, _ = extract(reference_images(protocol.reference, protocol.n, protocol.seed), extractor)
    return frechet_distance(_reference(protocol, cache).moments, Moments.of(features, extractor=extractor.id))
