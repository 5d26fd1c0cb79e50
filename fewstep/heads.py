"""Discriminator heads on the features of any block of any network, which taps take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from fewstep.denoiser import Cond, Denoiser, Prediction, cat
from fewstep.taps import Ending, Enough, Taps, bottleneck, several, stages, tapped, taps_of

Point = tuple[Tensor, Tensor]  # x_t (B, C, *S) and its t (B,)


def whole(width: int) -> nn.Module:
    """One logit for a whole map: DMD2's head for 8x8 maps (its SD 1.5), to which any other map is pooled first."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(8),
        nn.Conv2d(width, width, 4, 2, 1),
        nn.GroupNorm(_groups(width), width),
        nn.SiLU(),
        nn.Conv2d(width, width, 4, 4),
        nn.GroupNorm(_groups(width, least=3), width),  # of a single place
        nn.SiLU(),
        nn.Conv2d(width, 1, 1),
    )


def tokenwise(width: int) -> nn.Module:
    """A logit for each token, from its surroundings (LADD, SANA-Sprint; group norm in the place of spectral and batch norms,
    whose running state would have to be remembered)."""
    inner = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(_groups(width), width), nn.LeakyReLU(0.2))
    return nn.Sequential(
        nn.Conv2d(width, width, 1),
        nn.GroupNorm(_groups(width), width),
        nn.LeakyReLU(0.2),
        _Residual(inner),
        nn.Conv2d(width, 1, 1),
    )


def averaged(width: int) -> nn.Module:
    """One logit, the mean over a map of patchwise ones (FastGen's heads for transformers)."""
    half = max(1, width // 2)
    return nn.Sequential(
        nn.Conv2d(width, half, 4, 2, 2),
        nn.GroupNorm(_groups(half), half),
        nn.LeakyReLU(0.2),
        nn.Conv2d(half, 1, 1),
        nn.AdaptiveAvgPool2d(1),
    )


def _groups(width: int, least: int = 1) -> int:
    """The most groups, up to 32, of at least so many channels each. At a single place it takes three: the norm of one number is 0
    and of two +-1, whatever they are, and nothing behind it would learn."""
    return next(n for n in range(min(32, max(1, width // least)), 0, -1) if width % n == 0)


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Forked(nn.Module):
    """One head a tap; their logits side by side, (B, K)."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features: list[Tensor]) -> Tensor:
        return torch.cat([head(f).flatten(1) for head, f in zip(self.heads, features, strict=True)], 1)


@dataclass(frozen=True)
class Kind:
    """A way to judge: whose features (the critic's learn from the judging too, the teacher's
    are frozen, pixels are a frozen feature network's on decoded clean samples), which blocks where
    none are named, and the head on each. eyes: how many points are judged together, their features side by side."""

    backbone: Literal["critic", "teacher", "pixels"]
    taps: Callable[[Any], tuple[str, ...]]
    head: Callable[[int], nn.Module]
    eyes: int = 1


KINDS = {
    "dmd2": Kind("critic", bottleneck, whole),  # arXiv 2405.14867, appendix
    "beside": Kind("critic", bottleneck, whole, eyes=2),  # arXiv 2402.13929: a landing, and the point that the jump began at
    "ladd": Kind("teacher", several, tokenwise),  # arXiv 2403.12015
    "projected": Kind("teacher", bottleneck, averaged),
    "pixel": Kind("pixels", stages, averaged),  # after ADD, arXiv 2311.17042, and Flash-DMD
}


@dataclass(frozen=True)
class Heads:
    """Which heads: kind, a key of KINDS; taps, names of the blocks they listen to (none: the kind's own choice);
    features, the network that sees pixels."""

    kind: str = "dmd2"
    taps: tuple[str, ...] = ()
    features: str = "zoo:sprites-clip"

    @property
    def backbone(self) -> Literal["critic", "teacher", "pixels"]:
        return KINDS[self.kind].backbone

    def taps_on(self, net: Any) -> Taps:
        """The taps on a network. Raises ValueError for a block that it has not."""
        return taps_of(net, self.taps or KINDS[self.kind].taps(net))

    def build(self, net: Any, seed: int) -> Forked:
        """Untrained heads for a network, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Forked([KINDS[self.kind].head(width * KINDS[self.kind].eyes) for width in self.taps_on(net).widths])


@final
@dataclass(frozen=True)
class Discriminator:
    """A Judge: heads on the taps of a denoiser, which may be a role, wrapped or not, a full copy or an adapter."""

    denoiser: Denoiser
    taps: Taps
    heads: Callable[[list[Tensor]], Tensor]

    def logits(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Logits (B, K) of "x_t is noised real data", float32; the network runs no further than its last tapped block."""
        return self.heads(self._features(x_t, t, cond))

    def beside(self, points: Sequence[Point], origin: Point | None, cond: Cond) -> list[Tensor]:
        """Logits (B, K) of each of several points (x_t, t) under the same conditions, beside the features of the origin where
        there is one; all from one pass."""
        asked = [*points, *([] if origin is None else [origin])]
        x_t, t = (torch.cat(part) for part in zip(*asked, strict=True))
        features = self._features(x_t, t, cat([cond] * len(asked)))
        seen = list(zip(*(maps.chunk(len(asked)) for maps in features), strict=True))
        if origin is None:
            return [self.heads(list(maps)) for maps in seen]
        return [self.heads([torch.cat(pair, 1) for pair in zip(maps, seen[-1], strict=True)]) for maps in seen[:-1]]

    def _features(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        with tapped(self.taps.blocks, stop=True) as found:
            ending = Ending(self.denoiser.net, len(self.taps.blocks), found)
            with suppress(Enough):
                replace(self.denoiser, net=ending)(x_t, t, cond)
        return self.taps.read(found, x_t, cond)

    def both(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Tensor]:
        """The denoiser's own prediction and the logits, from one pass."""
        with tapped(self.taps.blocks, stop=False) as found:
            prediction = self.denoiser(x_t, t, cond)
        return prediction, self.heads(self.taps.read(found, x_t, cond))
