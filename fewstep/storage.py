"""Frozen weights kept small: in 8 or 4 bits, made whole where they are used, and once more where backward asks for them.

Diffusers' own layer-wise casting puts a layer's 8-bit weights back after its forward, where its backward meets them and fails;
here autograd keeps a note of how to make the weights again. On any device, with nothing to install."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Packed = tuple[Tensor, Tensor]
BLOCK = 64  # weights that share a scale in nf4


@dataclass(frozen=True)
class Format:
    """How weights (O, ...) are kept: pack -> (codes, scales), and unpack -> weights of a shape, in a dtype."""

    pack: Callable[[Tensor], Packed]
    unpack: Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]


def _scales(rows: Tensor, largest: float) -> Tensor:
    """What each row is divided by so that it fits (O, 1), float32."""
    return (rows.abs().amax(1, keepdim=True) / largest).clamp(min=1e-12)


def _pack_fp8(weight: Tensor) -> Packed:
    rows = weight.float().flatten(1)
    scales = _scales(rows, 448.0)  # the largest number in e4m3
    return (rows / scales).to(torch.float8_e4m3fn), scales


def _pack_int8(weight: Tensor) -> Packed:
    rows = weight.float().flatten(1)
    scales = _scales(rows, 127.0)
    return (rows / scales).round().to(torch.int8), scales


def _unpack_rows(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return (codes.to(dtype) * scales.to(dtype)).reshape(shape)


def nf4_levels() -> Tensor:
    """The levels (16,) of NormalFloat: quantiles of a normal law, and zero (QLoRA, arXiv 2305.14314, appendix E)."""
    end = 0.9677083
    above = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    return (levels / levels.abs().max()).float()


def _pack_nf4(weight: Tensor) -> Packed:
    flat = weight.float().flatten()
    rows = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    scales, levels = _scales(rows, 1.0), nf4_levels().to(weight.device)
    codes = torch.bucketize(rows / scales, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return codes[:, ::2] * 16 + codes[:, 1::2], scales


def _unpack_nf4(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    levels = nf4_levels().to(codes.device, dtype)
    both = torch.stack([codes // 16, codes % 16], 2).flatten(1)
    return (levels[both.int()] * scales.to(dtype)).flatten()[: math.prod(shape)].reshape(shape)


Noted = dict[int, tuple[Callable[[], Tensor], weakref.ref[Any]]]  # storage of a weight made whole -> how it was made


def _made(make: Callable[[], Tensor], noted: Noted) -> Tensor:
    weight = make()
    storage = weight.untyped_storage()
    key = storage._cdata
    noted[key] = make, weakref.ref(storage, lambda _: noted.pop(key, None))
    return weight


class _Packed(nn.Module):
    """A parametrization: the weight is what its packed form unpacks to."""

    def __init__(self, form: Format, shape: torch.Size, dtype: torch.dtype, noted: Noted) -> None:
        super().__init__()
        self.form, self.shape, self.dtype, self.noted = form, shape, dtype, noted

    def forward(self, codes: Tensor, scales: Tensor) -> Tensor:
        return _made(lambda: self.form.unpack(codes.detach(), scales.detach(), self.shape, self.dtype), self.noted)

    def right_inverse(self, weight: Tensor) -> Packed:
        return self.form.pack(weight)


class _Away(nn.Module):
    """A parametrization: the weight stays in host memory and is copied to where its layer is."""

    away: Tensor

    def __init__(self, weight: Tensor, noted: Noted) -> None:
        super().__init__()
        self.noted = noted
        away = weight.detach().cpu() if weight.device.type == "cuda" else weight.detach()
        self.register_buffer("away", away.pin_memory() if torch.cuda.is_available() else away, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> _Away:
        return self  # wherever the network goes

    def forward(self, here: Tensor) -> Tensor:
        return _made(lambda: self.away.to(here.device, non_blocking=True), self.noted)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.new_empty(0)


Keeping = Callable[[Tensor, torch.dtype, Noted], nn.Module]


def _packed(form: Format) -> Keeping:
    return lambda weight, dtype, noted: _Packed(form, weight.shape, dtype, noted)


# How a frozen weight may be kept, by the name a config has for it.
KEEPINGS: dict[str, Keeping] = {
    "fp8": _packed(Format(_pack_fp8, _unpack_rows)),
    "int8": _packed(Format(_pack_int8, _unpack_rows)),
    "nf4": _packed(Format(_pack_nf4, _unpack_nf4)),
    "host": lambda weight, dtype, noted: _Away(weight, noted),
}

# Where a network's notes are.
_NOTED = "_fewstep_noted"


def keep_small(net: nn.Module, keeping: Keeping, dtype: torch.dtype, skipped: Iterable[str]) -> None:
    """Keeps the matrices and convolutions of a frozen network, which is in `dtype` and computes in it, in another way.

    skipped: patterns of the names of layers that are left as they are."""
    patterns, noted = [re.compile(x) for x in skipped], Noted()
    for name, layer in list(net.named_modules()):
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not any(p.search(name) for p in patterns):
            parametrize.register_parametrization(layer, "weight", keeping(layer.weight, dtype, noted), unsafe=True)
    setattr(net, _NOTED, noted)


def noting(net: nn.Module) -> AbstractContextManager[None]:
    """While it is entered, autograd keeps a note in place of a weight that was made whole."""
    noted: Noted | None = getattr(net, _NOTED, None)
    if noted is None:
        return nullcontext()

    def pack(x: Tensor) -> Any:
        known = noted.get(x.untyped_storage()._cdata)
        return x if known is None else (known[0], x.size(), x.stride(), x.storage_offset())

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        make, *view = kept
        return make().as_strided(*view)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
