"""LoRA as files name it: one row of NAMINGS a layout, read by the exporter, its inverse and `proof.py` alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

A, B = ".lora_A.weight", ".lora_B.weight"  # as PEFT and networks.Role name the two matrices


@dataclass(frozen=True)
class Naming:
    """How a layout spells module `x.y`: prefix + "x.y" with its dots as `separator` + one of the suffixes `a`, `b`.

    alpha: the layout stores each module's alpha beside it; without it a reader assumes alpha == rank."""

    prefix: str
    separator: str
    a: str
    b: str
    alpha: bool = False

    def stem(self, module: str) -> str:
        return self.prefix + module.replace(".", self.separator)


# (layout, component) -> names. "kohya" is what ComfyUI and A1111 read: lora_unet_... for UNets, diffusion_model. for DiTs.
NAMINGS: dict[tuple[str, str], Naming] = {
    ("diffusers", "unet"): Naming("unet.", ".", A, B),
    ("diffusers", "transformer"): Naming("transformer.", ".", A, B),
    ("kohya", "unet"): Naming("lora_unet_", "_", ".lora_down.weight", ".lora_up.weight", alpha=True),
    ("kohya", "transformer"): Naming("diffusion_model.", ".", A, B),
}


def naming(layout: str, component: str) -> Naming:
    """The row of NAMINGS. Raises ValueError for one that is not there."""
    if (layout, component) not in NAMINGS:
        known = sorted({name for name, of in NAMINGS if of == component})
        raise ValueError(f"no LoRA layout {layout!r} for a {component}; choose one of: {', '.join(known) or 'none'}")
    return NAMINGS[layout, component]


def modules(weights: Iterable[str]) -> list[str]:
    """The modules that a LoRA's keys belong to. Raises ValueError for one that is no LoRA matrix or lacks its other half."""
    keys = set(weights)
    names = sorted({k.removesuffix(A).removesuffix(B) for k in keys})
    if odd := sorted(keys ^ {name + end for name in names for end in (A, B)}):
        raise ValueError(f"{odd[0]!r} is not one half of a LoRA (…{A} with …{B}); export the student's own weights")
    return names


def fold(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The same adapter with its scale alpha / rank multiplied into B, so that alpha == rank: float32, on the CPU."""
    return {k: (v.detach().cpu().float() * (scale if k.endswith(B) else 1.0)).contiguous() for k, v in weights.items()}


def rank(folded: Mapping[str, Tensor]) -> int:
    """The one rank of an adapter."""
    ranks = {len(v) for k, v in folded.items() if k.endswith(A)}
    if len(ranks) != 1:
        raise ValueError(f"an exported LoRA has one rank, this one has {sorted(ranks)}")
    return ranks.pop()


def delta(a: Tensor, b: Tensor) -> Tensor:
    """What a folded pair adds to its weight: B A for a linear layer; for a convolution A is the kernel and B is 1x1."""
    return (b.flatten(1) @ a.flatten(1)).reshape(len(b), *a.shape[1:])


@torch.no_grad()
def merge(state: Mapping[str, Tensor], folded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights with the folded adapter added in."""
    added = {f"{name}.weight": delta(folded[name + A], folded[name + B]) for name in modules(folded)}
    if missing := sorted(added.keys() - state.keys()):
        raise ValueError(f"the network has no {missing[0]} to merge the LoRA into; export it with the teacher it was trained on")
    return {k: v + added[k].to(v) if k in added else v for k, v in state.items()}


def spell(folded: Mapping[str, Tensor], names: Naming) -> dict[str, Tensor]:
    """A folded adapter under a layout's names, with alpha == rank where the layout stores it."""
    out: dict[str, Tensor] = {}
    for name in modules(folded):
        stem = names.stem(name)
        if stem + names.a in out:
            raise ValueError(f"two layers would both be called {stem} in this layout; export it with layout='diffusers'")
        out[stem + names.a], out[stem + names.b] = folded[name + A], folded[name + B]
        if names.alpha:
            out[stem + ".alpha"] = torch.tensor(float(len(folded[name + A])))
    return out


def unspell(tensors: Mapping[str, Tensor], names: Naming, layers: Iterable[str]) -> dict[str, Tensor]:
    """The inverse of `spell`, for a network with these layers: a folded adapter, whatever alpha the file states.

    Raises ValueError for a key that belongs to none of the layers."""
    left, out = dict(tensors), {}
    for name in layers:
        stem = names.stem(name)
        if stem + names.a in left:
            a, b = left.pop(stem + names.a), left.pop(stem + names.b)
            alpha = float(left.pop(stem + ".alpha", torch.tensor(float(len(a)))))
            out[name + A], out[name + B] = a, b * (alpha / len(a))
    if left:
        raise ValueError(f"{min(left)} belongs to no layer of this network ({len(left)} such keys)")
    return out
