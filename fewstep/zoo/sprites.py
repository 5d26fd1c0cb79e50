"""The `sprites` world: captioned drawings of one to three coloured shapes, 64x64 RGB.

`draw(seed, n)` makes images and captions; `fewstep.zoo.reading.read` recovers what a picture shows, so that prompt alignment
has an exact score. A caption states size, colour and shape of every object, the background, and where it is unambiguous the
relation of the first two objects. Everything else varies freely (exact place, rotation, proportions, texture, shading, the
background's tint), so that the law of images given a caption has real entropy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

SIDE = 64
SIZES = ("small", "large")
SHAPES = ("circle", "square", "triangle", "star", "cross")
TEXTURES = ("plain", "striped", "dotted")
COLOURS = {
    "red": (0.86, 0.12, 0.14),
    "yellow": (0.95, 0.82, 0.12),
    "green": (0.13, 0.65, 0.22),
    "cyan": (0.15, 0.75, 0.82),
    "blue": (0.15, 0.25, 0.88),
    "purple": (0.62, 0.18, 0.74),
}
BACKGROUNDS = {"white": 0.94, "grey": 0.52, "black": 0.08}
SKIES = {"plain": 0.0, "hazy": 0.035, "cloudy": 0.055, "stormy": 0.085, "wild": 0.13}  # deviation of a ground's brightness
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Radius of the disc of equal area, in pixels: size is then readable from area whatever the shape.
RADII = {"small": (6.0, 7.5), "large": (9.8, 12.0)}
# Farthest point of each shape from its centre, over the radius of the disc of equal area.
_EXTENT = np.array([1.0, 1.253, 1.555, 1.541, 1.253])
_DRIFT = 2.2  # pixels; standard deviation of the blur that makes clouds of white noise
_COUNT_LAW = (0.40, 0.40, 0.20)
# |dx| must exceed |dy| by this factor before "left of" is said: nearer the diagonal people disagree.
DOMINANCE = 1.3


@dataclass(frozen=True)
class Sprite:
    """One object: names as captions say them, centre in pixels (x to the right, y down), texture or "" where unknown."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    texture: str = ""


@dataclass(frozen=True)
class Scene:
    """What a picture shows; sky is "" where unknown, or where a world has none."""

    sprites: tuple[Sprite, ...]
    background: str
    sky: str = ""


@dataclass(frozen=True)
class Law:
    """How a world is drawn: by how much sprites are turned (radians to either side), how bright grounds are, and whether skies
    lie on them."""

    turn: float
    levels: tuple[float, float, float]
    skies: bool


LAWS = {
    "sprites": Law(turn=np.pi, levels=(0.94, 0.52, 0.08), skies=False),
    # Clouds are a Gaussian field, whose contrast a sampler of few steps loses as it loses the detail of photographs.
    "clouds": Law(turn=0.25, levels=(0.84, 0.50, 0.15), skies=True),
}


def relation(a: Sprite, b: Sprite) -> str | None:
    """How `a` lies to `b` ("left of", "above", ...), or None near the diagonal."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > DOMINANCE * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > DOMINANCE * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def caption(scene: Scene, *, texture: bool = False) -> str:
    """The sentence that describes a scene; `texture=True` also says what ordinary captions leave free."""

    def noun(s: Sprite) -> str:
        words = (s.size, s.texture, s.colour, s.shape) if texture else (s.size, s.colour, s.shape)
        return "a " + " ".join(words)

    names = [noun(s) for s in scene.sprites]
    text = names[0]
    if len(names) > 1:
        joint = relation(scene.sprites[0], scene.sprites[1]) or "and"
        text = f"{text} {joint} {names[1]}"
    if len(names) > 2:
        text = f"{text} and {names[2]}"
    sky = f"{scene.sky} " if texture and scene.sky else ""
    return f"{text} on a {sky}{scene.background} background"


_NOUN = re.compile(rf"a ({'|'.join(SIZES)}) (?:(?:{'|'.join(TEXTURES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")


@dataclass(frozen=True)
class Claim:
    """What a caption says: (size, colour, shape) of each object, relation of the first two or None, background or None."""

    nouns: tuple[tuple[str, str, str], ...]
    relation: str | None
    background: str | None


def parse(text: str) -> Claim:
    """Reads a caption of this world. Raises ValueError for a text that names no object of it."""
    found = list(_NOUN.finditer(text))
    if not found:
        raise ValueError(f"no sprite is named in {text!r}; captions look like 'a small red circle on a grey background'")
    joint = None
    if len(found) > 1:
        between = text[found[0].end() : found[1].start()].strip()
        joint = between if between in RELATIONS else None
    ground = re.search(rf"on a (?:(?:{'|'.join(SKIES)}) )?({'|'.join(BACKGROUNDS)}) background", text)
    nouns = tuple((m.group(1), m.group(2), m.group(3)) for m in found)
    return Claim(nouns=nouns, relation=joint, background=ground.group(1) if ground else None)


def scenes(seed: int, n: int, world: str = "sprites") -> tuple[list[Scene], dict[str, np.ndarray]]:
    """`n` random scenes and the numbers that draw them (arrays with a leading axis of n). Depends on (seed, n, world) alone."""
    law = LAWS[world]
    rng = np.random.default_rng(seed)
    p: dict[str, np.ndarray] = {}
    p["count"] = rng.choice(3, size=n, p=_COUNT_LAW) + 1
    p["colour"] = rng.random((n, len(COLOURS))).argsort(1)[:, :3]  # distinct colours: each names one object
    p["shape"] = rng.integers(len(SHAPES), size=(n, 3))
    size = rng.integers(2, size=(n, 3))
    size[p["count"] == 3, 1:] = 0  # three objects fit only if at most one is large
    lo, hi = (np.array([RADII[s][k] for s in SIZES])[size] for k in (0, 1))
    p["radius"] = lo + (hi - lo) * rng.random((n, 3))
    p["aspect"] = np.exp(rng.uniform(-0.2, 0.2, (n, 3)))
    p["angle"] = rng.uniform(0, 2 * np.pi, (n, 3)) * (law.turn / np.pi) + (np.pi - law.turn)
    p["texture"] = rng.integers(len(TEXTURES), size=(n, 3))
    p["period"] = rng.uniform(5.0, 8.0, (n, 3))
    p["phase"] = rng.uniform(0, 2 * np.pi, (n, 3, 3))
    p["shade"] = rng.uniform(-0.22, 0.22, (n, 3, 2))
    p["ground"] = rng.integers(len(BACKGROUNDS), size=n)
    p["tint"] = rng.uniform(-0.05, 0.05, (n, 1)) + rng.uniform(-0.015, 0.015, (n, 3))
    p["slope"] = rng.uniform(-0.10, 0.10, (n, 2))
    reach = p["radius"] * _EXTENT[p["shape"]] * np.sqrt(np.maximum(p["aspect"], 1 / p["aspect"]))
    p["centre"], fits = _place(rng, reach, p["count"])
    p["count"] = np.where(fits, p["count"], 1)
    p["level"] = np.array(law.levels, np.float32)[p["ground"]]
    if law.skies:
        p["sky"], p["weather"] = rng.integers(len(SKIES), size=n), rng.integers(2**63, size=n)
    names = (SIZES, tuple(COLOURS), SHAPES, TEXTURES)
    found = []
    for i in range(n):
        sprites = tuple(
            Sprite(
                names[0][size[i, k]],
                names[1][p["colour"][i, k]],
                names[2][p["shape"][i, k]],
                float(p["centre"][i, k, 0]),
                float(p["centre"][i, k, 1]),
                names[3][p["texture"][i, k]],
            )
            for k in range(p["count"][i])
        )
        sky = tuple(SKIES)[p["sky"][i]] if law.skies else ""
        found.append(Scene(sprites, tuple(BACKGROUNDS)[p["ground"][i]], sky))
    return found, p


def _place(rng: np.random.Generator, reach: np.ndarray, count: np.ndarray, tries: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Centres (n, 3, 2) by rejection, objects inside the frame and apart; and whether a place was found for all of them."""
    n = len(count)
    room = np.maximum(SIDE - 2 * (reach + 1), 0)
    centres = reach[:, None, :, None] + 1 + rng.random((n, tries, 3, 2)) * room[:, None, :, None]
    ok = np.ones((n, tries), bool)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        gap = np.linalg.norm(centres[:, :, a] - centres[:, :, b], axis=-1) - (reach[:, a] + reach[:, b] + 1.5)[:, None]
        ok &= (gap > 0) | (count <= b)[:, None]
    return centres[np.arange(n), ok.argmax(1)], np.asarray(ok.any(1))


def _outline(shape: int, u: np.ndarray, v: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed distance in pixels (negative inside) of the unit-aspect shape whose area is that of a disc of radius r."""
    if shape == 0:
        return np.hypot(u, v) - r
    if shape == 1:
        return np.maximum(abs(u), abs(v)) - 0.8862 * r
    if shape == 2:
        side = np.maximum(v, np.maximum(-0.5 * v + 0.8660 * u, -0.5 * v - 0.8660 * u))
        return side - 0.7776 * r
    if shape == 3:
        tip = 1.541 * r
        theta = np.abs((np.arctan2(v, u) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        rho = np.hypot(u, v)
        x, y = rho * np.cos(theta), rho * np.sin(theta)
        bx, by = 0.45 * np.cos(np.pi / 5) * tip - tip, 0.45 * np.sin(np.pi / 5) * tip
        return ((x - tip) * by - y * bx) / np.hypot(bx, by)
    arm = 1.189 * r
    wide, tall = np.maximum(abs(u) - arm, abs(v) - arm / 3), np.maximum(abs(u) - arm / 3, abs(v) - arm)
    return np.minimum(wide, tall)


def paint(p: dict[str, np.ndarray]) -> np.ndarray:
    """Images (n, 64, 64, 3) uint8 of the scenes that `scenes` described."""
    n = len(p["count"])
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5
    slope = p["slope"][:, 0, None, None] * (x / SIDE - 0.5) + p["slope"][:, 1, None, None] * (y / SIDE - 0.5)
    image = (p["level"][:, None] + p["tint"])[:, None, None, :] + slope[..., None]
    image = image.astype(np.float32)
    if "sky" in p:
        image += (np.array(list(SKIES.values()), np.float32)[p["sky"], None, None] * _clouds(p["weather"]))[..., None]
    palette = np.array(list(COLOURS.values()), np.float32)
    for k in range(3):
        for shape in range(len(SHAPES)):
            at = np.flatnonzero((p["count"] > k) & (p["shape"][:, k] == shape))
            if not len(at):
                continue
            q = {
                key: p[key][at, k].astype(np.float32)
                for key in ("radius", "aspect", "angle", "period", "phase", "shade", "centre")
            }
            wide = lambda a: a[:, None, None]  # noqa: E731
            dx, dy = x - wide(q["centre"][:, 0]), y - wide(q["centre"][:, 1])
            c, s, root = wide(np.cos(q["angle"])), wide(np.sin(q["angle"])), wide(np.sqrt(q["aspect"]))
            u, v = (c * dx + s * dy) / root, (c * dy - s * dx) * root
            cover = np.clip(0.5 - _outline(shape, u, v, wide(q["radius"])), 0, 1)
            shade = 1 + (wide(q["shade"][:, 0]) * dx + wide(q["shade"][:, 1]) * dy) / wide(q["radius"])
            colour = palette[p["colour"][at, k]][:, None, None, :] * (shade * _weave(p["texture"][at, k], dx, dy, q))[..., None]
            image[at] += cover[..., None] * (np.clip(colour, 0, 1) - image[at])
    assert len(image) == n
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _clouds(seeds: np.ndarray) -> np.ndarray:
    """Periodic Gaussian fields (n, 64, 64) of deviation 1, correlated over about five pixels."""
    wave = np.fft.fftfreq(SIDE)
    blur = np.exp(-0.5 * (2 * np.pi * _DRIFT) ** 2 * (wave[:, None] ** 2 + wave[None, :] ** 2))
    blur /= np.sqrt((blur**2).mean())
    white = np.stack([np.random.default_rng(seed).standard_normal((SIDE, SIDE)) for seed in seeds])
    return np.fft.ifft2(np.fft.fft2(white) * blur).real.astype(np.float32)


def _weave(texture: np.ndarray, dx: np.ndarray, dy: np.ndarray, q: dict[str, np.ndarray]) -> np.ndarray:
    """Brightness factor in [0.55, 1] of each pixel: flat, bands, or a lattice of dots."""
    turn, wave = q["phase"][:, 0, None, None], (2 * np.pi / q["period"])[:, None, None]
    a = np.sin(wave * (np.cos(turn) * dx + np.sin(turn) * dy) + q["phase"][:, 1, None, None])
    b = np.sin(wave * (np.cos(turn) * dy - np.sin(turn) * dx) + q["phase"][:, 2, None, None])
    pattern = np.where((texture == 1)[:, None, None], a, (a + b) - 0.6)
    dark = np.clip(0.5 + 1.5 * pattern, 0, 1) * (texture > 0)[:, None, None]
    return 1 - 0.45 * dark


def draw(seed: int, n: int, world: str = "sprites") -> tuple[np.ndarray, list[str]]:
    """`n` images (n, 64, 64, 3) uint8 of a world and their captions; the same for the same arguments."""
    found, numbers = scenes(seed, n, world)
    return paint(numbers), [caption(s) for s in found]


def captions(seed: int, n: int, world: str = "sprites") -> list[str]:
    """The captions that `draw(seed, n, world)` gives, without the drawing."""
    return [caption(s) for s in scenes(seed, n, world)[0]]
