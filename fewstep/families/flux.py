"""FLUX.1, Qwen-Image and Z-Image: transformers over packed latents or lists of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.denoiser import Cond
from fewstep.families.base import (
    FLOW_SAMPLERS,
    Config,
    Family,
    Setting,
    flow,
    flow_target,
    net_config,
    pack,
    spatial_factor,
    standardised,
    unpack,
)
from fewstep.families.padding import unpadded

_ATTENTION: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
_JOINT: tuple[str, ...] = (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def _flux_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    words, (h, w) = cond.tensors["prompt"], x.shape[-2:]
    rows, columns = torch.arange(h // 2, device=x.device), torch.arange(w // 2, device=x.device)
    places = torch.cartesian_prod(torch.zeros(1, device=x.device), rows.float(), columns.float())
    out = net(
        hidden_states=pack(x),
        timestep=time,
        guidance=cond.tensors["guidance"] if net_config(net)["guidance_embeds"] else None,
        pooled_projections=cond.tensors["pooled"],
        encoder_hidden_states=words,
        txt_ids=words.new_zeros(words.shape[1], 3),
        img_ids=places.to(words.dtype),
        return_dict=False,
    )[0]
    return unpack(out, x)


def _flux_encode(pipe: Any, prompts: list[str], setting: Setting) -> Cond:
    embeds, pooled, _ = pipe.encode_prompt(prompts, None, device=pipe.device, max_sequence_length=512)
    guidance = torch.full((len(prompts),), setting.guidance, dtype=torch.float32, device=embeds.device)
    return Cond({"prompt": embeds, "pooled": pooled, "guidance": guidance})


def _packed_shape(net: Config, vae: Config, size: tuple[int, ...]) -> tuple[int, ...]:
    factor = 2 ** len(vae["temperal_downsample"]) if "temperal_downsample" in vae else spatial_factor(vae)
    return net["in_channels"] // 4, 2 * (size[0] // (2 * factor)), 2 * (size[1] // (2 * factor))


FLUX = Family(
    call=_flux_call,
    encode=_flux_encode,
    schedule=flow(0.0, 1.0),
    target=flow_target,
    samplers=FLOW_SAMPLERS,
    lora_targets=(*_JOINT, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
    no_words=lambda c: {
        "prompt_embeds": torch.zeros(1, 2, c["joint_attention_dim"]),
        "pooled_prompt_embeds": torch.zeros(1, c["pooled_projection_dim"]),
    },
    embedded=True,
    default_guidance=3.5,
    size=lambda net, vae: (1024, 1024),
    latents=_packed_shape,
    pack=pack,
)


def _qwen_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    (words, mask), (h, w) = unpadded(cond), x.shape[-2:]
    full = bool((cond.tensors["length"] == words.shape[1]).all())
    out = net(
        hidden_states=pack(x),
        timestep=time,
        encoder_hidden_states=words,
        encoder_hidden_states_mask=None if full else mask.bool(),
        img_shapes=[[(1, h // 2, w // 2)]] * len(x),
        return_dict=False,
    )[0]
    return unpack(out, x)


def _qwen_encode(pipe: Any, prompts: list[str], setting: Setting) -> Cond:
    embeds, mask = pipe.encode_prompt(prompts, device=pipe.device, max_sequence_length=512)
    lengths = torch.full((len(embeds),), embeds.shape[1]) if mask is None else mask.sum(1).cpu()
    return Cond({"prompt": nn.functional.pad(embeds, (0, 0, 0, 512 - embeds.shape[1])), "length": lengths})


def _qwen_pixels(pipe: Any, x: Tensor) -> Tensor:
    z = pipe.vae.encode(x.unsqueeze(2).to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mean.float()
    mean, std = standardised(pipe.vae, z)
    return ((z - mean) / std).squeeze(2)


def _qwen_decode(pipe: Any, x: Tensor) -> Tensor:
    z = x.unsqueeze(2)
    mean, std = standardised(pipe.vae, z)
    return pipe.vae.decode((z * std + mean).to(pipe.vae.device, pipe.vae.dtype)).sample[:, :, 0]


def _same_token_norm(conditional: Tensor, guided: Tensor) -> Tensor:
    """QwenImagePipeline's guidance keeps the norm that every token has without it."""
    c, g = pack(conditional), pack(guided)
    return unpack(g * (c.norm(dim=-1, keepdim=True) / g.norm(dim=-1, keepdim=True)), guided)


QWEN = Family(
    call=_qwen_call,
    encode=_qwen_encode,
    null=lambda pipe, setting: _qwen_encode(pipe, [" "], setting),  # the negative prompt of its documentation; it has no default
    schedule=flow(0.0, 1.0),
    target=flow_target,
    samplers=FLOW_SAMPLERS,
    lora_targets=(*_JOINT, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    no_words=lambda c: {
        "prompt_embeds": torch.zeros(1, 2, c["joint_attention_dim"]),
        "prompt_embeds_mask": torch.ones(1, 2),
        "true_cfg_scale": 1.0,
    },
    guide=lambda g: {"true_cfg_scale": g, "negative_prompt": " "} if g != 1 else {"true_cfg_scale": 1.0},
    renorm=_same_token_norm,
    default_guidance=4.0,
    size=lambda net, vae: (1024, 1024),
    latents=_packed_shape,
    pack=pack,
    encode_pixels=_qwen_pixels,
    decode=_qwen_decode,
    refuse=lambda pipe: "its network takes guidance as an input" if pipe.transformer.config.guidance_embeds else None,
)


def _z_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    captions = [e[:n] for e, n in zip(cond.tensors["prompt"], cond.tensors["length"].tolist(), strict=True)]
    # The network's output is the velocity towards data: x0 - eps.
    return -torch.stack(net(list(x.unsqueeze(2).unbind(0)), time, captions, return_dict=False)[0]).squeeze(2)


def _z_limit(pipe: Any) -> int:
    return min(512, pipe.tokenizer.model_max_length)


def _z_tokens(pipe: Any, prompts: list[str]) -> tuple[list[int], int]:
    said = [[{"role": "user", "content": prompt}] for prompt in prompts]
    chats = pipe.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    return [len(ids) for ids in pipe.tokenizer(chats, verbose=False).input_ids], _z_limit(pipe)


def _z_encode(pipe: Any, prompts: list[str], setting: Setting) -> Cond:
    length = _z_limit(pipe)
    embeds, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=length)
    padded = nn.utils.rnn.pad_sequence(embeds, batch_first=True)
    padded = nn.functional.pad(padded, (0, 0, 0, length - padded.shape[1]))
    return Cond({"prompt": padded, "length": torch.tensor([len(e) for e in embeds])})


ZIMAGE = Family(
    call=_z_call,
    encode=_z_encode,
    tokens=_z_tokens,
    schedule=flow(1.0, 0.0),
    target=flow_target,
    samplers=FLOW_SAMPLERS,
    lora_targets=(*_ATTENTION, "w1", "w2", "w3"),
    no_words=lambda c: {"prompt_embeds": [torch.zeros(2, c["cap_feat_dim"])], "guidance_scale": 0.0},
    guide=lambda g: {"guidance_scale": g - 1},
    default_guidance=5.0,
)
