"""A network that knows pictures as the judge's eyes: latents are decoded with their graph and seen by its image tower."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.denoiser import Cond, Denoiser
from fewstep.evaluation.features import clip_source, open_clip_model
from fewstep.heads import Heads
from fewstep.networks import Role

STAGES = re.compile(r"visual\.(layer\d+|transformer\.resblocks\.\d+|trunk\.(stages|blocks)\.\d+)")


class Pixels(nn.Module):
    """Latents (B, C, H, W) to whatever the image tower `visual` makes of the pictures that `decode` paints of them, in [-1, 1].

    decoder: the network in `decode`, which moves along and is not trained. size, mean, std: what the tower was trained on.
    `widths` names every block that can be tapped, with its channels: those that give maps (B, C, h, w), or tokens (B, n, C) whose
    last are a square."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        decoder: nn.Module | None,
        visual: nn.Module,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.visual, self.decoder = visual.eval().requires_grad_(False), decoder
        if decoder is not None:
            decoder.requires_grad_(False)
        self.decode, self.size, self.config = decode, size, dict[str, Any]()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)
        self.widths: dict[str, int] = {}
        hooks = [m.register_forward_hook(self._note(f"visual.{k}")) for k, m in visual.named_modules() if k]
        with torch.no_grad():
            visual(torch.zeros_like(self.mean).expand(1, -1, size, size))
        for hook in hooks:
            hook.remove()

    def _note(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim in (3, 4):
                self.widths[name] = output.shape[1 if output.ndim == 4 else 2]

        return hook

    @property
    def stages(self) -> tuple[str, ...]:
        """At most four of the tower's stages, evenly spread. Raises ValueError where they go by other names."""
        found = [name for name in self.widths if STAGES.fullmatch(name)]
        if not found:
            raise ValueError(f"taps: the stages of this feature network are not known; name some of: {', '.join(self.widths)}")
        n = min(4, len(found))
        return tuple(found[(i + 1) * len(found) // n - 1] for i in range(n))

    def forward(self, x: Tensor) -> Any:
        images = self.decode(x).float() / 2 + 0.5
        if images.shape[2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        return self.visual((images - self.mean) / self.std)


def look(net: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """How the judge calls such a network: a picture is all that it is shown."""
    return net(x)


def looking(denoiser: Denoiser, heads: Heads) -> Denoiser:
    """What heads listen to: a role as it is, or one of pixels, which is shown x at any time, t = 0 among them."""
    if heads.backbone != "pixels":
        return denoiser
    return replace(denoiser, target="epsilon", call=look, guidance=None, grid=())


def pixels_role(heads: Heads, decode: Callable[[Tensor], Tensor], decoder: nn.Module | None) -> dict[str, Role]:
    """Where the heads look at pixels, the feature network as a role that trains nothing."""
    if heads.backbone != "pixels":
        return {}
    return {"pixels": Role("pixels", open_pixels(heads.features, decode, decoder), owns=False, dtype=torch.float32)}


def open_pixels(name: str, decode: Callable[[Tensor], Tensor], decoder: nn.Module | None) -> Pixels:
    """The image tower of zoo:NAME, open_clip:FOLDER or open_clip:ARCHITECTURE:WEIGHTS. Raises ValueError for another name."""
    visual = open_clip_model(*clip_source(name), device="cpu").model.visual
    cfg = visual.preprocess_cfg
    size = cfg["size"][0] if isinstance(cfg["size"], (tuple, list)) else cfg["size"]
    return Pixels(decode, decoder, visual, size, tuple(cfg["mean"]), tuple(cfg["std"]))
