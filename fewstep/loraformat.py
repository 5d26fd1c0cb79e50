"""LoRA as files name it: how a layout spells modules, and the arithmetic of adapters. Which names a layout has: `keymaps.py`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import keymaps
from fewstep.keymaps import Row

A, B = ".lora_A.weight", ".lora_B.weight"  # as PEFT and networks.Role name the two matrices
DOWN, UP = ".lora_down.weight", ".lora_up.weight"


@dataclass(frozen=True)
class Naming:
    """How a layout spells layer `x.y`: prefix + "x.y" with its dots as `separator` + one of the suffixes `a`, `b`.

    rows: the layout's own layers where they are not the network's modules, see `keymaps.py`. alpha: the layout stores each
    layer's alpha beside it; without it a reader assumes alpha == rank. reader: who loads such files, see `strength.py`."""

    layout: str
    prefix: str
    separator: str
    a: str
    b: str
    alpha: bool = False
    rows: tuple[Row, ...] = ()
    reader: str = "diffusers"

    def stem(self, layer: str) -> str:
        return self.prefix + layer.replace(".", self.separator)

    def stems(self, modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Stem -> the modules whose LoRAs lie under it, in the order of their rows there.

        Raises ValueError for a module that the layout has no name for, a layer that lacks a part, and two that share a name."""
        found: dict[str, dict[str, int]] = {}
        whole: dict[str, int] = {}
        for module in modules:
            layer, part, parts = self._layer(module)
            stem = self.stem(layer)
            if part in found.setdefault(stem, {}).values():
                raise ValueError(f"two layers would both be called {stem} in this layout; export it in another one")
            found[stem][module], whole[stem] = part, parts
        if partial := sorted(stem for stem, parts in found.items() if len(parts) < whole[stem]):
            raise ValueError(
                f"in the layout {self.layout!r} {partial[0]} is {whole[partial[0]]} layers of this network in one, of which this "
                f"LoRA has only {', '.join(sorted(found[partial[0]]))}; export it in another layout"
            )
        return {stem: tuple(sorted(parts, key=parts.__getitem__)) for stem, parts in found.items()}

    def _layer(self, module: str) -> tuple[str, int, int]:
        """(the layout's layer, which part of it a module is, how many parts it has)."""
        if not self.rows:
            return module, 0, 1
        for layer, place, names in self.rows:
            parts = names.split()
            for k, part in enumerate(parts):
                pattern = re.escape(f"{place}.{part}" if place else part).replace(r"\#", r"(\d+)")
                if match := re.fullmatch(pattern, module):
                    return layer.replace("#", (match.groups() or ("#",))[0]), k, len(parts)
        raise ValueError(f"the layout {self.layout!r} has no name for {module}; export it in another one")


def naming(layout: str, network: str, component: str) -> Naming:
    """The names of a layout for a network class. Raises ValueError, naming those there are, for one that nobody has published."""
    if layout == "diffusers":
        return Naming(layout, f"{component}.", ".", A, B)
    if layout == "peft":
        return Naming(layout, "base_model.model.", ".", A, B, reader="peft")
    rows = keymaps.LAYERS.get((layout, network))
    if rows is None:
        known = ["diffusers", *(name for name, of in keymaps.LAYERS if of == network), "peft"]
        raise ValueError(f"no {layout!r} names are known for the LoRA of a {network}; choose one of: {', '.join(known)}")
    reader = "diffusers" if (layout, network) in keymaps.DIFFUSERS_READS else "keys"
    if layout == "kohya" or network in keymaps.UNETS:
        return Naming(layout, "lora_unet_", "_", DOWN, UP, True, rows, reader)
    return Naming(layout, "diffusion_model.", ".", A, B, False, rows, reader)


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


def apart(folded: Mapping[str, Tensor], components: Sequence[str]) -> list[dict[str, Tensor]]:
    """The adapter of each component of a teacher, from that of all; if it has several, keys begin with their names."""
    if len(components) == 1:
        return [dict(folded)]
    return [{k.removeprefix(f"{name}."): v for k, v in folded.items() if k.startswith(f"{name}.")} for name in components]


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
    """A folded adapter under a layout's names, with alpha == rank where the layout stores it.

    Modules that the layout has as one layer stack their A's, and their B's lie along a diagonal: n of rank r become one of rank
    n r that adds the same to each module's rows."""
    out: dict[str, Tensor] = {}
    for stem, parts in names.stems(modules(folded)).items():
        a, b = [folded[p + A] for p in parts], [folded[p + B] for p in parts]
        out[stem + names.a], out[stem + names.b] = (a[0], b[0]) if len(parts) == 1 else (torch.cat(a), torch.block_diag(*b))
        if names.alpha:
            out[stem + ".alpha"] = torch.tensor(float(len(out[stem + names.a])))
    return out


def where(folded: Mapping[str, Tensor], names: Naming) -> dict[str, tuple[str, int, int]]:
    """Module -> (stem of its names in the file, its first row in B there, its number of rows)."""
    found = {}
    for stem, parts in names.stems(modules(folded)).items():
        first = 0
        for part in parts:
            found[part] = (stem, first, len(folded[part + B]))
            first += len(folded[part + B])
    return found
