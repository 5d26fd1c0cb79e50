"""PixArt-Sigma, Sana and Lumina 2: transformers that attend to masked text."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.denoiser import Cond
from fewstep.families.base import (
    FLOW_SAMPLERS,
    SPACED_FLOW_SAMPLERS,
    VP_SAMPLERS,
    Family,
    Setting,
    flow,
    flow_target,
    vp,
    vp_target,
)
from fewstep.families.padding import masked, unpadded

_ATTENTION: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = 300  # tokens of Sana's prompts
_AS_ASKED = {"use_resolution_binning": False}  # else the pipeline draws at a size of its own choice and resizes


def _no_words(width: str) -> Any:
    """Stand-ins for a prompt of width config[width] with its mask."""
    return lambda config: {
        "prompt_embeds": torch.zeros(1, 2, config[width]),
        "prompt_attention_mask": torch.ones(1, 2),
        "negative_prompt": None,
        "guidance_scale": 1.0,
    }


def _pixart_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    words, mask = unpadded(cond)
    out = net(
        x,
        encoder_hidden_states=words,
        encoder_attention_mask=mask,
        timestep=time,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return out[:, : x.shape[1]]  # the learned variance comes behind the mean


def _pixart_encode(pipe: Any, prompts: list[str], setting: Setting) -> Cond:
    return masked(*pipe.encode_prompt(prompts, False, device=pipe.device, clean_caption=True)[:2])


PIXART = Family(
    call=_pixart_call,
    encode=_pixart_encode,
    schedule=vp,
    target=vp_target,
    samplers=VP_SAMPLERS,
    lora_targets=(*_ATTENTION, "ff.net.0.proj", "ff.net.2"),
    no_words=_no_words("caption_channels"),
    default_guidance=4.5,
    lora_loader=False,
    options=_AS_ASKED,
)


def _sana_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    words, mask = unpadded(cond)
    return net(x, encoder_hidden_states=words, encoder_attention_mask=mask, timestep=time, return_dict=False)[0]


def instruction(kind: type) -> list[str]:
    """What a SanaPipeline (a class) puts before every prompt, and before no negative one."""
    return inspect.signature(kind.__call__).parameters["complex_human_instruction"].default


def _sana_encode(pipe: Any, prompts: list[str], setting: Setting) -> Cond:
    opening = instruction(type(pipe))
    length = _longest(pipe, prompts, "\n".join(opening))
    options = {"max_sequence_length": length, "complex_human_instruction": opening, "device": pipe.device}
    words, mask = pipe.encode_prompt(prompts, False, **options)[:2]
    words = words * mask[..., None]  # what is padded to depends on the batch, and is heard by nobody
    return masked(F.pad(words, (0, 0, 0, _TEXT - length)), F.pad(mask, (0, _TEXT - length)))


def _longest(pipe: Any, prompts: list[str], opening: str) -> int:
    """To how many tokens these prompts are padded before they are read: the longest's, at most the pipeline's 300.

    A causal reader's tokens do not hear of the padding after them, and most of what it would read is padding."""
    read = pipe.tokenizer([opening, *(opening + prompt for prompt in pipe._text_preprocessing(prompts))]).input_ids
    return min(_TEXT, max(map(len, read)) - len(read[0]) + 2)  # the pipeline takes two off


def _sana_null(pipe: Any, setting: Setting) -> Cond:
    return masked(*pipe.encode_prompt([""], True, "", device=pipe.device)[2:])


def _sana_pixels(pipe: Any, x: Tensor) -> Tensor:
    """Of Sana's deterministic autoencoder."""
    return pipe.vae.encode(x.to(pipe.vae.device, pipe.vae.dtype)).latent.float() * pipe.vae.config.scaling_factor


def _sana_refusal(pipe: Any) -> str | None:
    if pipe.transformer.config.timestep_scale == 1 and not pipe.transformer.config.guidance_embeds:
        return None
    return "its network has another clock or takes guidance as an input, as Sana Sprint's, a few-step student already, does"


SANA = Family(
    call=_sana_call,
    encode=_sana_encode,
    null=_sana_null,
    schedule=flow(0.0, 1000.0),
    target=flow_target,
    samplers=SPACED_FLOW_SAMPLERS,
    spaced=("renoise",),
    lora_targets=(*_ATTENTION, "ff.conv_inverted", "ff.conv_point"),  # its feed-forward layers are convolutions
    no_words=_no_words("caption_channels"),
    default_guidance=4.5,
    encode_pixels=_sana_pixels,
    options=_AS_ASKED,
    refuse=_sana_refusal,
)


def _lumina_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    words, mask = unpadded(cond)
    # The network's output is the velocity towards data: x0 - eps.
    return -net(x, timestep=time, encoder_hidden_states=words, encoder_attention_mask=mask.long(), return_dict=False)[0]


def _lumina_encode(pipe: Any, prompts: list[str], setting: Setting) -> Cond:
    return masked(*pipe.encode_prompt(prompts, False, device=pipe.device)[:2])


def _lumina_null(pipe: Any, setting: Setting) -> Cond:
    """The empty prompt without the system prompt that the others have."""
    return masked(*pipe.encode_prompt([""], True, device=pipe.device)[2:])


def _same_row_norm(conditional: Tensor, guided: Tensor) -> Tensor:
    """cfg_normalization as Lumina2Pipeline computes it: over the last axis, which is the picture's width."""
    return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


LUMINA2 = Family(
    call=_lumina_call,
    encode=_lumina_encode,
    null=_lumina_null,
    schedule=flow(1.0, 0.0),
    target=flow_target,
    samplers=FLOW_SAMPLERS,
    lora_targets=(*_ATTENTION, "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"),
    no_words=_no_words("cap_feat_dim"),
    renorm=_same_row_norm,
    default_guidance=4.0,
)
