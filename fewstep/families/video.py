"""Videos: Wan 2.1 and 2.2 (two networks), LTX-Video, CogVideoX. x is (B, C, F, H, W) over latent frames."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor

from fewstep.denoiser import Cond
from fewstep.families.base import (
    FLOW_SAMPLERS,
    PLAIN_FLOW_SAMPLERS,
    Config,
    Family,
    Setting,
    flow,
    flow_target,
    net_config,
    spatial_factor,
    standardised,
    vp,
    vp_target,
)
from fewstep.families.padding import masked, unpadded

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
    if pipe.transformer is None or (pipe.transformer_2 is None) != (pipe.config.boundary_ratio is None):
        return "it is a part of Wan 2.2 A14B, whose two networks share the times at its boundary_ratio; all three are wanted"
    if pipe.config.expand_timesteps:
        return "Wan 2.2 TI2V feeds its network a time for every token; Wan 2.1 and other text-to-video models of one time can be"
    return None


WAN = Family(
    second="transformer_2",
    call=_wan_call,
    encode=_wan_encode,
    schedule=flow(0.0, 1000.0),
    target=flow_target,
    samplers=PLAIN_FLOW_SAMPLERS,  # renoise: its call takes no sigmas, without which FlowMatchLCM would waste the last step
    lora_targets=(*_ATTENTION, "ffn.net.0.proj", "ffn.net.2"),
    no_words=lambda c: {"prompt_embeds": torch.zeros(1, 2, c["text_dim"]), "guidance_scale": 1.0},
    default_guidance=5.0,
    size=lambda net, vae: (81, 480, 832),
    latents=_wan_latents,
    decode=_wan_decode,
    refuse=_wan_refusal,
)


def _ltx_factors(vae: Config) -> tuple[int, int]:
    """Frames and pixels that a latent stands for."""
    folds = 2 ** sum(vae["spatio_temporal_scaling"])
    time, space = vae["temporal_compression_ratio"], vae["spatial_compression_ratio"]
    return time or vae["patch_size_t"] * folds, space or vae["patch_size"] * folds


def _ltx_pack(x: Tensor) -> Tensor:
    """(B, C, F, H, W) to tokens (B, FHW, C)."""
    return x.flatten(2).transpose(1, 2)


def _ltx_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    frames, height, width = x.shape[2:]
    words, mask = unpadded(cond)
    out = net(
        hidden_states=_ltx_pack(x),
        encoder_hidden_states=words,
        timestep=time,
        encoder_attention_mask=mask,
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=tuple(cond.tensors["scale"][0]),
        return_dict=False,
    )[0]
    return out.transpose(1, 2).reshape(x.shape)


def _ltx_encode(pipe: Any, prompts: list[str], setting: Setting) -> Cond:
    """T5's tokens with their mask; the seconds (at 25 frames each, the pipeline's default) and pixels of a latent."""
    words = masked(*pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=pipe.device)[:2]).tensors
    time, space = _ltx_factors(pipe.vae.config)
    scale = torch.tensor([[time / 25, space, space]], device=words["prompt"].device)
    return Cond({**words, "scale": scale.repeat(len(prompts), 1)})


def _ltx_latents(net: Config, vae: Config, size: tuple[int, ...]) -> tuple[int, ...]:
    time, space = _ltx_factors(vae)
    return net["in_channels"], (size[0] - 1) // time + 1, size[1] // space, size[2] // space


def _ltx_decode(pipe: Any, x: Tensor) -> Tensor:
    vae = pipe.vae
    mean, std = (v.reshape(1, -1, 1, 1, 1).to(x) for v in (vae.latents_mean, vae.latents_std))
    z = (x * std / vae.config.scaling_factor + mean).to(vae.device, vae.dtype)
    clean = z.new_zeros(len(z)) if vae.config.timestep_conditioning else None
    return vae.decode(z, clean).sample.transpose(1, 2)


def _ltx_refusal(pipe: Any) -> str | None:
    config = pipe.transformer.config
    return None if config.patch_size == config.patch_size_t == 1 else "its network sees patches of latents, as no LTX-Video does"


LTX = Family(
    call=_ltx_call,
    encode=_ltx_encode,
    schedule=flow(0.0, 1000.0),
    target=flow_target,
    samplers=FLOW_SAMPLERS,
    lora_targets=(*_ATTENTION, "ff.net.0.proj", "ff.net.2"),
    no_words=lambda c: {
        "prompt_embeds": torch.zeros(1, 2, c["caption_channels"]),
        "prompt_attention_mask": torch.ones(1, 2),
        "guidance_scale": 1.0,
    },
    default_guidance=3.0,
    size=lambda net, vae: (161, 512, 704),
    latents=_ltx_latents,
    pack=_ltx_pack,
    decode=_ltx_decode,
    refuse=_ltx_refusal,
)


def _cog_pack(x: Tensor) -> Tensor:
    """(B, C, F, H, W) to (B, F, C, H, W)."""
    return x.transpose(1, 2)


def _cog_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    words, places = cond.tensors["prompt"], _cog_places(net_config(net), x)
    out = net(hidden_states=_cog_pack(x), encoder_hidden_states=words, timestep=time, image_rotary_emb=places, return_dict=False)
    return out[0].transpose(1, 2)


def _cog_places(config: Config, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rotary embeddings, as the pipeline makes them for CogVideoX 1.0 (5B); the 2B model has none."""
    if not config["use_rotary_positional_embeddings"]:
        return None
    patch = config["patch_size"]
    grid = (x.shape[-2] // patch, x.shape[-1] // patch)
    crops = get_resize_crop_region_for_grid(grid, config["sample_width"] // patch, config["sample_height"] // patch)
    width, frames = config["attention_head_dim"], x.shape[2]
    return get_3d_rotary_pos_embed(width, crops, grid_size=grid, temporal_size=frames, device=x.device)


def _cog_encode(pipe: Any, prompts: list[str], setting: Setting) -> Cond:
    return Cond({"prompt": pipe.encode_prompt(prompts, None, False, device=pipe.device)[0]})


def _cog_size(net: Config, vae: Config) -> tuple[int, ...]:
    factor = spatial_factor(vae)
    return net["sample_frames"], net["sample_height"] * factor, net["sample_width"] * factor


def _cog_latents(net: Config, vae: Config, size: tuple[int, ...]) -> tuple[int, ...]:
    factor, time = spatial_factor(vae), vae["temporal_compression_ratio"]
    return net["in_channels"], (size[0] - 1) // time + 1, size[1] // factor, size[2] // factor


def _cog_decode(pipe: Any, x: Tensor) -> Tensor:
    vae = pipe.vae
    return vae.decode((x / vae.config.scaling_factor).to(vae.device, vae.dtype)).sample.transpose(1, 2)


COGVIDEOX = Family(
    call=_cog_call,
    encode=_cog_encode,
    schedule=vp,
    target=vp_target,
    samplers={  # renoise: LCMScheduler does not shift the table as snr_shift_scale says
        "ddim": ("CogVideoXDDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True})
    },
    lora_targets=(*_ATTENTION, "ff.net.0.proj", "ff.net.2"),
    no_words=lambda c: {"prompt_embeds": torch.zeros(1, 2, c["text_embed_dim"]), "guidance_scale": 1.0},
    default_guidance=6.0,
    size=_cog_size,
    latents=_cog_latents,
    pack=_cog_pack,
    decode=_cog_decode,
    refuse=lambda pipe: (
        "CogVideoX 1.5 packs frames in patches of time; CogVideoX 1.0 (2B, 5B) can be"
        if pipe.transformer.config.patch_size_t is not None
        else None
    ),
)
