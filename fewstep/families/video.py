"""Videos: Wan 2.1. x is (B, C, F, H, W) over latent frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Cond
from fewstep.families.base import PLAIN_FLOW_SAMPLERS, Config, Family, Setting, flow, flow_target, standardised

_ATTENTION: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


def _wan_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return net(hidden_states=x, timestep=time, encoder_hidden_states=cond.tensors["prompt"], return_dict=False)[0]


def _wan_encode(pipe: Any, prompts: list[str], setting: Setting) -> Cond:
    embeds, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512, device=pipe.device)
    return Cond({"prompt": embeds})


def _wan_latents(net: Config, vae: Config, size: tuple[int, ...]) -> tuple[int, ...]:
    frames, height, width = size
    factor = vae["scale_factor_spatial"]
    return net["in_channels"], (frames - 1) // vae["scale_factor_temporal"] + 1, height // factor, width // factor


def _wan_decode(pipe: Any, x: Tensor) -> Tensor:
    mean, std = standardised(pipe.vae, x)
    return pipe.vae.decode((x * std + mean).to(pipe.vae.device, pipe.vae.dtype)).sample.transpose(1, 2)


def _wan_refusal(pipe: Any) -> str | None:
    if pipe.transformer_2 is not None:
        return "Wan 2.2 A14B is two networks, each for its own part of the noise levels, and only one network is distilled here"
    if pipe.config.expand_timesteps:
        return "Wan 2.2 TI2V feeds its network a time for every token; Wan 2.1 and other text-to-video models of one time can be"
    return None


WAN = Family(
    call=_wan_call,
    encode=_wan_encode,
    schedule=flow(0.0, 1000.0),
    target=flow_target,
    samplers=PLAIN_FLOW_SAMPLERS,
    lora_targets=(*_ATTENTION, "ffn.net.0.proj", "ffn.net.2"),
    no_words=lambda c: {"prompt_embeds": torch.zeros(1, 2, c["text_dim"]), "guidance_scale": 1.0},
    default_guidance=5.0,
    size=lambda net, vae: (81, 480, 832),
    latents=_wan_latents,
    decode=_wan_decode,
    refuse=_wan_refusal,
)
