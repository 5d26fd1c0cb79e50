"""Unconditional and class-conditional UNets on pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Cond
from fewstep.families.base import VP_SAMPLERS, Family, Setting, net_config, vp, vp_target


def _pixel_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    labels = cond.tensors["label"].to(x.device) if net_config(net).get("num_class_embeds") else None
    out = net(x, time, class_labels=labels, return_dict=False)[0]
    return out[:, : x.shape[1]]  # a learned variance, where there is one, comes behind the mean


def _pixel_encode(pipe: Any, prompts: list[str], setting: Setting) -> Cond:
    """Labels written as numbers; an unconditional network ignores them."""
    return Cond({"label": torch.tensor([int(p) if p.isdigit() else 0 for p in prompts])})


DDPM = Family(
    component="unet",
    call=_pixel_call,
    encode=_pixel_encode,
    schedule=vp,
    target=vp_target,
    samplers={"ddim": VP_SAMPLERS["ddim"]},  # DDIMPipeline says more to its scheduler than LCMScheduler takes
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    no_words=lambda c: {"output_type": "np"},
    guide=lambda g: {},
    default_guidance=1.0,
    lora_loader=False,
    deployed="DDIMPipeline",
    sized=False,
    ask=lambda pipe, prompts: {"batch_size": len(prompts)},
    examples=("", ""),
)
