"""A student of several experts: `phased.load(EXPORT)` is a stock pipeline that hands over to the next at the trained times.

Imports Diffusers and nothing of fewstep: this is what a deployer copies, and every export of such a student has it inside. A
LoRA export needs its teacher's pipeline as base (a folder or a hub id), a full export does not.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

Network = Callable[..., Any]


def load(export: Path | str, base: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of an export, its own scheduler and its experts in place. Raises ValueError where the base is missing."""
    export = Path(export)
    facts = json.loads((export / "fewstep.json").read_text("utf-8"))
    files = facts["experts"]["files"]
    lora = facts["form"] == "lora"
    if lora and base is None:
        raise ValueError(
            f"{export} is made of LoRAs of {facts['teacher']['path']}; name that pipeline's folder or hub id as base"
        )
    pipe = diffusers.DiffusionPipeline.from_pretrained(base if lora else export, dtype=dtype, use_safetensors=True)
    net = getattr(pipe, facts["components"][0])
    alone = net.forward
    if lora:
        rules = json.loads((export / "scheduler" / "scheduler_config.json").read_text("utf-8"))
        pipe.scheduler = getattr(diffusers, rules["_class_name"]).from_config(rules)
        for name, file in files.items():
            pipe.load_lora_weights(export, weight_name=file, adapter_name=name)
        experts = [_adapter(pipe, name, alone) for name in files]
    else:
        others = [type(net).from_pretrained(export / folder, dtype=dtype) for folder in list(files.values())[1:]]
        experts = [alone, *(_follower(net, other) for other in others)]
    net.forward = in_turn(alone, experts, facts["experts"]["switches"], facts["experts"]["clock"])
    return pipe


def in_turn(forward: Network, experts: Sequence[Network], switches: Sequence[float], clock: float) -> Network:
    """A network's forward that asks the expert of the time it is fed: the one before switches[0], then the next at and after it.

    switches: times on the network's own clock, in the order in which a pipeline passes them. clock: the largest time it is fed,
    negative where the clock rises towards clean data. A time that was rounded to the sample's dtype is still the one it was."""
    signature, way = inspect.signature(forward), 1.0 if clock > 0 else -1.0

    @functools.wraps(forward)
    def answer(*args: Any, **kwargs: Any) -> Any:
        values = signature.bind(*args, **kwargs).arguments
        time = torch.as_tensor(values["timestep"] if "timestep" in values else values["t"]).flatten()[0]
        x = next(v for v in values.values() if isinstance(v, torch.Tensor | list))
        dtype = (x[0] if isinstance(x, list) else x).dtype
        slack = max(torch.finfo(dtype).eps, 1e-6) * abs(clock)
        k = sum(way * (float(time) - switch) <= slack for switch in switches)
        return experts[k](*args, **kwargs)

    return answer


def _adapter(pipe: Any, name: str, forward: Network) -> Network:
    def answer(*args: Any, **kwargs: Any) -> Any:
        if pipe.get_active_adapters() != [name]:
            pipe.set_adapters(name)
        return forward(*args, **kwargs)

    return answer


def _follower(net: Any, expert: Any) -> Network:
    """An expert with weights of its own, which goes where the pipeline's network goes."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        return expert.to(net.device, net.dtype)(*args, **kwargs)

    return answer
