"""Transformers that are told a class: DiT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Cond
from fewstep.families.base import VP_SAMPLERS, Family, Setting, vp, vp_target

NULL = 1000  # "no class", as DiTPipeline has it


def _dit_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    out = net(x, timestep=time, class_labels=cond.tensors["label"].to(x.device), return_dict=False)[0]
    return out[:, : x.shape[1]]  # a learned variance, where there is one, comes behind the mean


def _labels(pipe: Any, prompts: list[str]) -> list[int]:
    """Classes written as numbers, or as names that the pipeline knows; nothing is no class.

    Raises ValueError for what is no class of the network's."""
    found = []
    for prompt in prompts:
        label = int(prompt) if prompt.isdigit() else pipe.labels.get(prompt, -1) if prompt else NULL
        if not 0 <= label <= NULL:
            known = ", or by name" if pipe.labels else ""
            raise ValueError(f"{prompt!r} is no class of this teacher; write classes as numbers from 0 to {NULL - 1}{known}")
        found.append(label)
    return found


def _dit_encode(pipe: Any, prompts: list[str], setting: Setting) -> Cond:
    return Cond({"label": torch.tensor(_labels(pipe, prompts))})


def _dit_refusal(pipe: Any) -> str | None:
    classes = pipe.transformer.config.num_embeds_ada_norm
    if classes == NULL:
        return None
    return f"its network knows {classes} classes, and DiTPipeline says {NULL} for no class, so it can only be guided with {NULL}"


DIT = Family(
    call=_dit_call,
    encode=_dit_encode,
    schedule=vp,
    target=vp_target,
    samplers={name: VP_SAMPLERS[name] for name in ("ddim", "renoise")},  # it hands its scheduler no generator: see FLOW_SAMPLERS
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    no_words=lambda c: {"class_labels": [0], "guidance_scale": 1.0},
    default_guidance=4.0,
    lora_loader=False,
    sized=False,
    ask=lambda pipe, prompts: {"class_labels": _labels(pipe, prompts)},
    examples=("207", "360"),
    refuse=_dit_refusal,
)
