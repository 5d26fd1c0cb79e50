"""Reads a sprites picture back by plain image analysis, and scores it against a caption."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fewstep.zoo.sprites import BACKGROUNDS, COLOURS, RADII, SHAPES, SIDE, Scene, Sprite, paint, parse, scenes

_CHROMA_FULL = 0.45  # share of a colour's full chroma that counts as wholly covered: the darkest stripe has 0.55
_LEAST_AREA = 45.0  # pixels; the smallest sprite has 113
_SPLIT_AREA = np.pi * (RADII["small"][1] * RADII["large"][0])  # geometric mean of the nearest areas of the two sizes


def _opponent(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hue angle in radians and chroma, both (...)."""
    a = rgb[..., 0] - (rgb[..., 1] + rgb[..., 2]) / 2
    b = (rgb[..., 1] - rgb[..., 2]) * (3**0.5 / 2)
    return np.arctan2(b, a), np.hypot(a, b)


def _membership(rgb: np.ndarray) -> np.ndarray:
    """How much of each pixel belongs to each colour: (n, 64, 64, 3) in [0, 1] to (n, colours, 64, 64) in [0, 1]."""
    hue, chroma = _opponent(rgb)
    own_hue, own_chroma = _opponent(np.array(list(COLOURS.values())))
    turn = np.abs((hue[:, None] - own_hue[:, None, None] + np.pi) % (2 * np.pi) - np.pi)
    nearest = turn.argmin(1)
    mine = nearest[:, None] == np.arange(len(COLOURS))[:, None, None]
    cover = chroma[:, None] / (_CHROMA_FULL * own_chroma[:, None, None])
    # Below a third the "colour" of a pixel is the tint of the background, not paint.
    return np.where(mine & (cover > 0.33), np.clip(cover, 0, 1), 0).astype(np.float32)


def _shift_max(mask: np.ndarray) -> np.ndarray:
    """Dilation of boolean (m, 64, 64) by one pixel in the four directions."""
    out = mask.copy()
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    out[:, :, 1:] |= mask[:, :, :-1]
    out[:, :, :-1] |= mask[:, :, 1:]
    return out


def _main_blob(cover: np.ndarray) -> np.ndarray:
    """The connected part of `cover` (m, 64, 64) around its densest place, zero elsewhere."""
    box = cover.cumsum(1).cumsum(2)
    box = np.pad(box, ((0, 0), (1, 0), (1, 0)))
    dense = box[:, 7:, 7:] - box[:, :-7, 7:] - box[:, 7:, :-7] + box[:, :-7, :-7]
    at = dense.reshape(len(cover), -1).argmax(1)
    side = SIDE - 6
    seed = np.zeros(cover.shape, bool)
    seed[np.arange(len(cover)), at // side + 3, at % side + 3] = True
    solid = cover > 0.4
    blob = seed
    while True:
        grown = _shift_max(blob) & (solid | seed)
        if (grown == blob).all():
            break
        blob = grown
    return np.where(_shift_max(blob), cover, 0)


def _moments(blob: np.ndarray) -> dict[str, np.ndarray]:
    """Area, centre and rotation-, size- and aspect-invariant features (m, 5) of soft masks (m, 64, 64)."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64) + 0.5
    w = blob.astype(np.float64)
    area = np.maximum(w.sum((1, 2)), 1e-6)
    mean = lambda f: (w * f).sum((1, 2)) / area  # noqa: E731
    cx, cy = mean(x), mean(y)
    dx, dy = x - cx[:, None, None], y - cy[:, None, None]
    cov = np.stack([mean(dx * dx), mean(dx * dy), mean(dx * dy), mean(dy * dy)], -1).reshape(-1, 2, 2) + 1e-3 * np.eye(2)
    values, axes = np.linalg.eigh(cov)
    p = (axes[:, 0, 0, None, None] * dx + axes[:, 1, 0, None, None] * dy) / np.sqrt(values[:, 0, None, None])
    q = (axes[:, 0, 1, None, None] * dx + axes[:, 1, 1, None, None] * dy) / np.sqrt(values[:, 1, None, None])
    z, rho = p + 1j * q, np.hypot(p, q)
    spread = area / (4 * np.pi * np.sqrt(np.linalg.det(cov)))
    waves = [np.abs(mean(z**k)) / np.maximum(mean(rho**k), 1e-9) for k in (3, 4, 5)]
    return {"area": area, "x": cx, "y": cy, "features": np.stack([spread, *waves, mean(rho**4) / 8], -1)}


@lru_cache(maxsize=1)
def _yardstick() -> tuple[np.ndarray, np.ndarray]:
    """Mean features of each (size, shape), (2, shapes, 5), and the whitening matrices (2, 5, 5), from 1,500 drawings."""
    found, numbers = scenes(seed=20_000, n=1500)
    numbers["count"] = np.ones_like(numbers["count"])
    rgb = paint(numbers) / np.float32(255)
    cover = _membership(rgb)[np.arange(len(rgb)), numbers["colour"][:, 0]]
    features = _moments(_main_blob(cover))["features"]
    large = np.array([s.sprites[0].size == "large" for s in found])
    means, whiten = np.zeros((2, len(SHAPES), 5)), np.zeros((2, 5, 5))
    for size in (0, 1):
        rest = []
        for shape in range(len(SHAPES)):
            mine = features[(large == size) & (numbers["shape"][:, 0] == shape)]
            means[size, shape] = mine.mean(0)
            rest.append(mine - mine.mean(0))
        whiten[size] = np.linalg.inv(np.cov(np.concatenate(rest).T) + 1e-6 * np.eye(5))
    return means, whiten


def read(images: np.ndarray) -> list[Scene]:
    """What each picture (n, 64, 64, 3) uint8 shows; sprites by colour, further blobs of a colour with shape "blob"."""
    if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(f"read wants uint8 images of shape (n, {SIDE}, {SIDE}, 3), not {images.dtype} {images.shape}")
    return [scene for start in range(0, len(images), 256) for scene in _read(images[start : start + 256])]


def _read(images: np.ndarray) -> list[Scene]:
    rgb = images / np.float32(255)
    cover = _membership(rgb)
    means, whiten = _yardstick()
    free = cover.max(1) < 0.2
    grey = rgb.mean(-1)
    levels = np.array(list(BACKGROUNDS.values()))
    tone = np.array([np.median(g[f]) if f.any() else np.median(g) for g, f in zip(grey, free, strict=True)])
    ground = np.abs(tone[:, None] - levels).argmin(1)
    sprites: list[list[Sprite]] = [[] for _ in images]
    for c, colour in enumerate(COLOURS):
        here = np.flatnonzero(cover[:, c].sum((1, 2)) > _LEAST_AREA)
        if not len(here):
            continue
        blob = _main_blob(cover[here, c])
        m = _moments(blob)
        rest = cover[here, c].sum((1, 2)) - m["area"]
        size = (m["area"] > _SPLIT_AREA).astype(int)
        gap = m["features"][:, None] - means[size]
        shape = np.einsum("nsi,nij,nsj->ns", gap, whiten[size], gap).argmin(1)
        for j, i in enumerate(here):
            x, y = float(m["x"][j]), float(m["y"][j])
            if m["area"][j] > _LEAST_AREA:
                sprites[i].append(Sprite(("small", "large")[size[j]], colour, SHAPES[shape[j]], x, y))
            if rest[j] > _LEAST_AREA:
                sprites[i].append(Sprite("small", colour, "blob", x, y))
    names = tuple(BACKGROUNDS)
    return [Scene(tuple(s), names[g]) for s, g in zip(sprites, ground, strict=True)]


def agreement(text: str, scene: Scene) -> dict[str, float]:
    """Share in [0, 1] of a caption's claims of each kind that a scene fulfils: colour, shape, size, count, background and,
    where the caption states one, relation."""
    claim = parse(text)
    by_colour = {s.colour: s for s in scene.sprites if s.shape != "blob"}
    mine = [by_colour.get(colour) for _, colour, _ in claim.nouns]
    total = len(claim.nouns)
    pairs = list(zip(claim.nouns, mine, strict=True))
    score = {
        "colour": sum(s is not None for s in mine) / total,
        "shape": sum(s is not None and s.shape == shape for (_, _, shape), s in pairs) / total,
        "size": sum(s is not None and s.size == size for (size, _, _), s in pairs) / total,
        "count": float(len(scene.sprites) == total),
    }
    if claim.background:
        score["background"] = float(scene.background == claim.background)
    if claim.relation:
        a, b = mine[0], mine[1]
        score["relation"] = float(a is not None and b is not None and _lies(a, b, claim.relation))
    return score


def _lies(a: Sprite, b: Sprite, joint: str) -> bool:
    """Whether `a` lies to `b` as said; captions state clear relations only, a picture needs the greater of two offsets."""
    dx, dy = a.x - b.x, a.y - b.y
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[joint]
    return along > 0 and along == max(abs(dx), abs(dy))


def accuracy(texts: list[str], images: np.ndarray) -> np.ndarray:
    """Attribute accuracy (n,) of each picture: the mean over the kinds of claims its caption makes."""
    if len(texts) != len(images):
        raise ValueError(f"{len(texts)} captions for {len(images)} images")
    return np.array([np.mean(list(agreement(t, s).values())) for t, s in zip(texts, read(images), strict=True)])
