"""Taps: what any block of any network gives, taken by hooks while it runs; no forward is ever copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.denoiser import Cond


class Enough(Exception):
    """Raised by the last tap of a pass that is wanted for its features alone. Whoever must finish in order on the way up (a
    gradient checkpoint, a role inside DistributedDataParallel) lets it pass when it has."""

    def __init__(self, features: tuple[Any, ...]) -> None:
        super().__init__("all taps have been reached")
        self.features = features


@contextmanager
def tapped(blocks: Mapping[str, nn.Module], then: Literal["go on", "forget", "stop"] = "go on") -> Iterator[dict[str, Any]]:
    """Collects the outputs of blocks by name while it is open; the hooks are gone afterwards, whatever happens.

    then: what comes behind the last block reached: the rest, the rest without a graph, or with `Enough` nothing."""
    found: dict[str, Any] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = output
            if then != "go on" and len(found) == len(blocks):
                if then == "stop":
                    raise Enough(tuple(found.values()))
                torch.set_grad_enabled(False)

        return hook

    with ExitStack() as hooks, torch.set_grad_enabled(torch.is_grad_enabled()):
        for name, block in blocks.items():
            hook = block.register_forward_hook(note(name))
            hooks.callback(hook.close if isinstance(hook, ExitStack) else hook.remove)
        yield found


@dataclass(frozen=True)
class Ending:
    """A network that says `Enough` itself where a wrapper (a role, DistributedDataParallel) has turned it into a return value."""

    net: Callable[..., Any]
    wanted: int
    found: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.net(*args, **kwargs)
        if len(self.found) == self.wanted:
            raise Enough(tuple(self.found.values()))
        return out


TEXT_FIRST = ("Flux2Transformer2DModel", "Lumina2Transformer2DModel")  # with text and image in one sequence, in this order


@dataclass(frozen=True)
class Taps:
    """Blocks of a network and the number of channels of each; patch, channels: how it cuts an image into tokens; 0: in a way of
    its own; text_first: in one sequence of both the text comes first."""

    blocks: dict[str, nn.Module] = field(repr=False)
    widths: tuple[int, ...]
    patch: int = 1
    channels: int | None = None
    text_first: bool = False

    def read(self, found: Mapping[str, Any], x_t: Tensor, cond: Cond) -> list[Tensor]:
        """What the blocks gave as maps (B, width, h, w) of x_t (B, C, H, W), at least float32; a video's
        frames (B, C, F, H, W) are one tall map."""
        maps = [self._map(found[name], x_t, cond) for name in self.blocks]
        return [m if m.dtype == torch.float64 else m.float() for m in maps]

    def _map(self, output: Any, x_t: Tensor, cond: Cond) -> Tensor:
        parts = [p for p in (output if isinstance(output, tuple) else (output,)) if isinstance(p, Tensor)]
        for part in parts:
            if part.ndim == x_t.ndim:
                return part
        packing = round((self.channels / x_t.shape[1]) ** 0.5) if self.channels else 1  # 2 where 2x2 latents are one channel set
        if not self.patch:  # no grid of x_t's: the tokens end with a square
            side = math.isqrt(parts[0].shape[1])
            return parts[0][:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
        *frames, height, width = x_t.shape[2:]
        h = math.prod(frames) * (height // (self.patch * packing))  # frames lie below one another
        w = width // (self.patch * packing)
        # Streams of text and image come apart, or as one sequence.
        tokens = min((p for p in parts if p.ndim == 3 and p.shape[1] >= h * w), key=lambda p: p.shape[1])
        places = torch.arange(h * w, device=tokens.device).expand(len(tokens), -1)
        if self.text_first and tokens.shape[1] > h * w:  # behind each sample's own words
            words = cond.tensors["prompt"]
            lengths = cond.tensors.get("length", torch.full((len(words),), words.shape[1]))
            places = places + lengths.to(places)[:, None]
        return tokens.take_along_dim(places[..., None], 1).transpose(1, 2).unflatten(2, (h, w))


def taps_of(net: Any, names: tuple[str, ...]) -> Taps:
    """The taps with these names. Raises ValueError where the network has no such block, or none whose width can be told."""
    blocks, widths = {}, []
    for name in names:
        try:
            blocks[name] = getattr(net, "junction", net.get_submodule)(name)
        except AttributeError as error:
            there = ", ".join(k for k, _ in net.named_modules() if k and k.count(".") == (k.split(".")[-1].isdigit()))
            raise ValueError(f"taps: {type(net).__name__} has no block {name!r}; there are: {there}") from error
        seen = getattr(net, "widths", {})  # of a network that has looked
        widths.append(seen[name] if name in seen else _width(name, blocks[name]))
    if hasattr(net, "widths"):
        return Taps(blocks, tuple(widths), patch=0)
    config = net.config
    patch = config.get("patch_size") or config.get("all_patch_size", (1,))[0]
    patch = patch if isinstance(patch, int) else patch[-1]
    return Taps(blocks, tuple(widths), patch, config.get("in_channels"), type(net).__name__ in TEXT_FIRST)


def _width(name: str, block: nn.Module) -> int:
    """Channels of what a block gives: of its last residual convolution, or of the residual stream its attention reads."""
    by_name: dict[str, Any] = {k.rpartition(".")[2]: m for k, m in block.named_modules()}
    if "conv2" in by_name:
        return by_name["conv2"].weight.shape[0]
    for reads in ("to_q", "to_qkv_mlp_proj"):
        if reads in by_name:
            return by_name[reads].weight.shape[1]
    raise ValueError(f"taps: the width of block {name!r} cannot be told; tap a whole residual or transformer block")


def bottleneck(net: Any) -> tuple[str, ...]:
    """The middle of a network: a UNet's mid block, a transformer's middle block."""
    if hasattr(net, "mid_block"):
        return ("mid_block",)
    name, blocks = _stack(net)
    return (f"{name}.{len(blocks) // 2}",)


def several(net: Any) -> tuple[str, ...]:
    """A UNet's way down and its mid block; a transformer's blocks at 0.1, 0.4, 0.7 and 0.95 of its depth (SANA-Sprint: 2, 8, 14
    and 19 of 20)."""
    if hasattr(net, "mid_block"):
        return (*(f"down_blocks.{i}" for i in range(len(net.down_blocks))), "mid_block")
    name, blocks = _stack(net)
    return tuple(dict.fromkeys(f"{name}.{int(part * len(blocks))}" for part in (0.1, 0.4, 0.7, 0.95)))


def stages(net: Any) -> tuple[str, ...]:
    """What a feature network calls its own."""
    return net.stages


def _stack(net: Any) -> tuple[str, nn.ModuleList]:
    """The longest list of blocks of a transformer."""
    net = getattr(net, "first", net)  # those of a relay are alike
    lists = [(name, child) for name, child in net.named_children() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(net).__name__} has no list of blocks to tap; name its blocks in taps")
    return max(lists, key=lambda item: len(item[1]))
