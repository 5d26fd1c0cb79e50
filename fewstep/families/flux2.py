"""FLUX.2: dev, whose guidance is an input of the network, and klein, which is guided by two passes.

x is what the pipelines call `latents`: 2x2 blocks of the autoencoder's latents as channels, standardised by the running
statistics of its batch norm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Cond
from fewstep.families.base import FLOW_SAMPLERS, Config, Family, Setting, flow, flow_target, net_config, spatial_factor

_JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
# Single blocks end in a layer called to_out, which elsewhere is a list: it is named block by block.
_SINGLE = ("to_qkv_mlp_proj", *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(48)))


def _call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    words, (h, w) = cond.tensors["prompt"], x.shape[-2:]
    one = torch.zeros(1, device=x.device)
    place = lambda *axes: torch.cartesian_prod(*(torch.arange(n, device=x.device).float() if n else one for n in axes))  # noqa: E731
    out = net(
        hidden_states=x.flatten(2).transpose(1, 2),
        encoder_hidden_states=words,
        timestep=time,
        guidance=cond.tensors["guidance"] if net_config(net)["guidance_embeds"] else None,
        txt_ids=place(0, 0, 0, words.shape[1]),
        img_ids=place(0, h, w, 0),
        return_dict=False,
    )[0]
    return out.transpose(1, 2).reshape(x.shape)


def _encode(pipe: Any, prompts: list[str], setting: Setting) -> Cond:
    embeds, _ = pipe.encode_prompt(prompts, device=pipe.device, max_sequence_length=512)
    guidance = torch.full((len(prompts),), setting.guidance, dtype=torch.float32, device=embeds.device)
    return Cond({"prompt": embeds, "guidance": guidance})


def _shape(net: Config, vae: Config, size: tuple[int, ...]) -> tuple[int, ...]:
    factor = 2 * spatial_factor(vae)
    return net["in_channels"], size[0] // factor, size[1] // factor


def _spread(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std) a channel of blocks of raw latents, shaped for x (B, C, H, W)."""
    mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return mean.to(x).reshape(1, -1, 1, 1), std.to(x).reshape(1, -1, 1, 1)


def _encode_pixels(pipe: Any, x: Tensor) -> Tensor:
    z = pipe.vae.encode(x.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mean.float()
    blocks = torch.nn.functional.pixel_unshuffle(z, 2)
    mean, std = _spread(pipe.vae, blocks)
    return (blocks - mean) / std


def _decode(pipe: Any, x: Tensor) -> Tensor:
    mean, std = _spread(pipe.vae, x)
    z = torch.nn.functional.pixel_shuffle(x * std + mean, 2)
    return pipe.vae.decode(z.to(pipe.vae.device, pipe.vae.dtype)).sample


FLUX2 = Family(
    call=_call,
    encode=_encode,
    schedule=flow(0.0, 1.0),
    target=flow_target,
    samplers=FLOW_SAMPLERS,
    lora_targets=(*_JOINT, *_FEED, *_SINGLE),
    no_words=lambda c: {"prompt_embeds": torch.zeros(1, 2, c["joint_attention_dim"])},
    embedded=True,
    default_guidance=4.0,
    size=lambda net, vae: (1024, 1024),
    latents=_shape,
    walked=lambda x: x.flatten(2).transpose(1, 2),
    encode_pixels=_encode_pixels,
    decode=_decode,
    refuse=lambda pipe: (
        None
        if pipe.transformer.config.guidance_embeds
        else "its network takes no guidance, and this pipeline gives no other; save it as a Flux2KleinPipeline"
    ),
)


def _klein_refusal(pipe: Any) -> str | None:
    if pipe.config.is_distilled:
        return "it is a few-step student already (is_distilled); the base model of FLUX.2 klein can be"
    return "its network takes guidance as an input" if pipe.transformer.config.guidance_embeds else None


KLEIN = replace(
    FLUX2,
    no_words=lambda c: {"prompt_embeds": torch.zeros(1, 2, c["joint_attention_dim"]), "guidance_scale": 1.0},
    embedded=False,
    refuse=_klein_refusal,
)
