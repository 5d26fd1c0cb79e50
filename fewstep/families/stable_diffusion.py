"""Stable Diffusion 1, 2 (epsilon or v), XL and 3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Cond
from fewstep.families.base import SPACED_FLOW_SAMPLERS, VP_SAMPLERS, Family, Setting, flow, flow_target, vp, vp_target

# The layers of DMD2's LoRA.
_UNET_LORA: tuple[str, ...] = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
_MMDIT_LORA: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_MMDIT_LORA += ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


def _sd_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return net(x, time, encoder_hidden_states=cond.tensors["prompt"], return_dict=False)[0]


def _sd_encode(pipe: Any, prompts: list[str], setting: Setting) -> Cond:
    embeds, _ = pipe.encode_prompt(prompts, pipe.device, 1, do_classifier_free_guidance=False)
    return Cond({"prompt": embeds})


def _clip_tokens(pipe: Any, prompts: list[str]) -> tuple[list[int], int]:
    return [len(ids) for ids in pipe.tokenizer(prompts, verbose=False).input_ids], pipe.tokenizer.model_max_length


SD = Family(
    component="unet",
    call=_sd_call,
    encode=_sd_encode,
    tokens=_clip_tokens,
    schedule=vp,
    target=vp_target,
    samplers=VP_SAMPLERS,
    lora_targets=_UNET_LORA,
    no_words=lambda c: {"prompt_embeds": torch.zeros(1, 2, c["cross_attention_dim"]), "guidance_scale": 1.0},
    default_guidance=7.5,
)


def _xl_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    added = {"text_embeds": cond.tensors["pooled"], "time_ids": cond.tensors["size"]}
    return net(x, time, encoder_hidden_states=cond.tensors["prompt"], added_cond_kwargs=added, return_dict=False)[0]


def _xl_encode(pipe: Any, prompts: list[str], setting: Setting) -> Cond:
    """Both text encoders, and the sizes."""
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, device=pipe.device, do_classifier_free_guidance=False)
    return _xl_resized(Cond({"prompt": embeds, "pooled": pooled}), setting)


def _xl_resized(cond: Cond, setting: Setting) -> Cond:
    """The "time ids" with which the pipeline is called for such a picture: original size, no crop, target size."""
    ids = cond.tensors["pooled"].new_tensor([[*setting.size, 0, 0, *setting.size]])
    return Cond({**cond.tensors, "size": ids.repeat(len(cond), 1)})


def _xl_null(pipe: Any, setting: Setting) -> Cond:
    empty = _xl_encode(pipe, [""], setting).tensors
    zeroed = pipe.config.force_zeros_for_empty_prompt
    return Cond({k: torch.zeros_like(empty[k]) if zeroed else empty[k] for k in ("prompt", "pooled")})


def _xl_no_words(config: Any) -> dict[str, Any]:
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    words = {"prompt_embeds": torch.zeros(1, 2, config["cross_attention_dim"]), "pooled_prompt_embeds": torch.zeros(1, pooled)}
    return {**words, "guidance_scale": 1.0}


SDXL = replace(
    SD, call=_xl_call, encode=_xl_encode, null=_xl_null, resized=_xl_resized, no_words=_xl_no_words, default_guidance=5.0
)


def _sd3_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    words, pooled = cond.tensors["prompt"], cond.tensors["pooled"]
    return net(hidden_states=x, timestep=time, encoder_hidden_states=words, pooled_projections=pooled, return_dict=False)[0]


def _sd3_encode(pipe: Any, prompts: list[str], setting: Setting) -> Cond:
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device=pipe.device, do_classifier_free_guidance=False)
    return Cond({"prompt": embeds, "pooled": pooled})


SD3 = Family(
    call=_sd3_call,
    encode=_sd3_encode,
    schedule=flow(0.0, 1000.0),
    target=flow_target,
    samplers=SPACED_FLOW_SAMPLERS,
    spaced=("renoise",),
    lora_targets=_MMDIT_LORA,
    no_words=lambda c: {
        "prompt_embeds": torch.zeros(1, 2, c["joint_attention_dim"]),
        "pooled_prompt_embeds": torch.zeros(1, c["pooled_projection_dim"]),
        "guidance_scale": 1.0,
    },
    default_guidance=7.0,
)
