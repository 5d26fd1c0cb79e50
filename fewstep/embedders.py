"""What a student's network may gain as inputs: the guidance scale it draws at, and a second time, the end of its jump.

Each is embedded and joins the network's time embedding. Embedders are submodules of the network, so they are trained, averaged
and stored with it, and hooks feed them, so that no Diffusers class is rewritten.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.experts import Relay

GUIDANCE, END = "guidance_scale", "end_time"  # the keyword arguments that such a network takes, each (B,)
WIDTH = 256
# Where Diffusers' networks embed their time; the first that a network has.
TIME_MODULES = (
    "time_embedding",
    "t_embedder",
    "time_text_embed.timestep_embedder",
    "adaln_single.emb.timestep_embedder",
    "time_embed.emb.timestep_embedder",
    "condition_embedder.time_embedder",
)


def waves(x: Tensor, width: int = WIDTH) -> Tensor:
    """[sin, cos] of 1000 x at `width` / 2 frequencies from 1 to 1e-4, (B, width), float32.

    To the bit what stock pipelines make of w = guidance_scale - 1 (LCM, arXiv 2310.04378, official script)."""
    step = torch.log(torch.tensor(10000.0)) / (width // 2 - 1)
    frequencies = torch.exp(torch.arange(width // 2, dtype=torch.float32) * -step).to(x.device)
    angles = (x.float() * 1000.0)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def inputs(net: Any) -> tuple[str, ...]:
    """Which of GUIDANCE and END a network takes."""
    gained = getattr(net, "gained", None)
    return gained.names if isinstance(gained, Gained) else ()


def stock_guidance(net: Any) -> bool:
    """Whether the network's own class embeds a guidance scale: the `timestep_cond` of UNet2DConditionModel."""
    return "time_cond_proj_dim" in net.config


def gain(net: Any, wanted: Iterable[str] = ()) -> None:
    """Gives a network, in place, the wanted inputs that it lacks; one that has stock guidance weights takes GUIDANCE as it is.

    The last layer of an embedder alone is zero: the network starts as it was, and every embedder weight can learn (with all of
    them zero only the last bias ever would). Raises ValueError for a network without a known time embedding, and for a relay."""
    had = inputs(net)
    if isinstance(net, Relay) and {*wanted} - {*had}:
        raise ValueError(
            f"objective: set like this it tells the student the {' and the '.join(wanted)}, which a student of two networks (as "
            "this teacher is) cannot be told; use one that tells it the time alone, such as dmd, sid or consistency"
        )
    if stock_guidance(net) and net.config["time_cond_proj_dim"] is not None:
        had += () if GUIDANCE in had else (GUIDANCE,)
    new = tuple(name for name in dict.fromkeys(wanted) if name not in had)
    if had + new == inputs(net):
        return
    if not hasattr(net, "gained"):
        module = net.get_submodule(time_module(net))
        net.gained = Gained(module, _last_linear(module).out_features)
        net.register_forward_pre_hook(net.gained.take, with_kwargs=True)
    device = next(net.parameters()).device
    for name in new:
        if name == GUIDANCE and stock_guidance(net):
            net.time_embedding.cond_proj = nn.Linear(WIDTH, net.time_embedding.linear_1.in_features, bias=False, device=device)
            nn.init.zeros_(net.time_embedding.cond_proj.weight)
            net.register_to_config(time_cond_proj_dim=WIDTH)
        else:
            net.gained.add(name, device)
    net.gained.names = had + new
    net.gained.stock = net.config["time_cond_proj_dim"] if stock_guidance(net) and GUIDANCE in had + new else 0


class Gained(nn.Module):
    """The embedders of a network; `take` is its forward pre-hook, `join` the forward hook of its time embedding."""

    def __init__(self, time_module: nn.Module, width: int) -> None:
        super().__init__()
        self.names: tuple[str, ...] = ()
        self.stock = 0  # width of the network's own guidance embedding
        self.width = width
        self.embed = nn.ModuleDict()
        self.now: Tensor | None = None  # of the forward that is running
        time_module.register_forward_hook(self.join)

    def add(self, name: str, device: torch.device) -> None:
        """A new embedder, two layers, the last one zero."""
        last = nn.Linear(self.width, self.width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.embed[name] = nn.Sequential(nn.Linear(WIDTH, self.width), nn.SiLU(), last).to(device)

    def take(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replaces what stock code does not know by what it does. Raises ValueError for an input that is missing."""
        kwargs = dict(kwargs)
        self.now = None
        for name in self.names:
            value = kwargs.pop(name, None)
            if value is None:
                raise ValueError(f"this network takes the input {name}; give its Denoiser a default, or the call a value")
            value = value - 1 if name == GUIDANCE else value  # w = g - 1 is what LCM embeds
            if name == GUIDANCE and self.stock:
                kwargs["timestep_cond"] = waves(value, self.stock)
            else:
                with torch.autocast(value.device.type, enabled=False):  # times are not for bfloat16
                    part = self.embed[name](waves(value))
                self.now = part if self.now is None else self.now + part
        return args, kwargs

    def join(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """The time embedding with what was gained."""
        return out if self.now is None else out + self.now.to(out.dtype)


def fold(net: Any, g: float) -> None:
    """Makes a network that takes inputs through gained embedders one that takes none of them, in place: it draws at the scale g,
    and all its jumps end at the clean end.

    The embeddings of g and of 0 are constants, and go into the bias that ends the time embedding. Raises ValueError where the
    time embedding does not end in a linear layer with a bias."""
    module = net.get_submodule(time_module(net))
    aside = getattr(module, "cond_proj", None)  # of stock guidance weights, which join the first layer
    last: nn.Module = [m for m in module.modules() if not list(m.children()) and m is not aside][-1]
    if not isinstance(last, nn.Linear) or last.bias is None:
        raise ValueError("the inputs of this network cannot be folded into its time embedding; keep the student in fewstep")
    constants = {GUIDANCE: g - 1.0, END: 0.0}
    with torch.no_grad():
        for name, embed in net.gained.embed.items():
            last.bias.add_(embed(waves(torch.tensor([constants[name]])))[0])
    module._forward_hooks.clear()
    net._forward_pre_hooks.clear()
    net._forward_pre_hooks_with_kwargs.clear()
    del net.gained


def time_module(net: nn.Module) -> str:
    """The name of the submodule that embeds a network's time. Raises ValueError where it is not known."""
    named = dict(net.named_modules())
    for name in TIME_MODULES:
        if name in named:
            return name
    raise ValueError(
        f"{type(net).__name__} embeds its time where fewstep does not look; add that submodule to embedders.TIME_MODULES"
    )


def _last_linear(module: nn.Module) -> nn.Linear:
    return [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
