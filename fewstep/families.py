"""The table of Diffusers families: how each pipeline class is read, called and deployed, about 25 lines a family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from fewstep.denoiser import Cond
from fewstep.schedules import DiscreteVP, NoiseSchedule, RectifiedFlow

UNET_LORA: tuple[str, ...] = (
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
)
UNET_LORA += ("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")  # DMD2's list


@dataclass(frozen=True)
class Family:
    """How one pipeline class is read, called and deployed.

    component: the attribute that is distilled. call: see Denoiser. encode: (pipe, prompts) -> Cond of their embeddings.
    no_words: from the network's config, keyword arguments that stand in for a prompt when only the pipeline's loop matters.
    schedule, target: from the pipeline's scheduler. samplers: sampler name -> (scheduler class, config) for the deployed
    pipeline, the default one first. guidance: our scale (1 = none) in the pipeline's own convention.
    """

    component: str
    call: Callable[[Any, Tensor, Tensor, Cond], Tensor]
    encode: Callable[[Any, list[str]], Cond]
    schedule: Callable[[Any], NoiseSchedule]
    target: Callable[[Any], str]
    samplers: dict[str, tuple[str, dict[str, Any]]]
    lora_targets: tuple[str, ...]
    no_words: Callable[[dict[str, Any]], dict[str, Any]]
    guidance: Callable[[float], float] = lambda g: g
    default_guidance: float = 7.5
    lora_loader: bool = True
    deployed: str | None = None  # the pipeline class that runs students, where it is not the teacher's
    sized: bool = True  # the pipeline's call takes height and width


def _vp(scheduler: Any) -> DiscreteVP:
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise ValueError(
            f"{type(scheduler).__name__} has no table of noise levels; save the teacher with its DDIM or DDPM scheduler"
        )
    return DiscreteVP(tuple(torch.as_tensor(table, dtype=torch.float64).tolist()))


def _vp_target(scheduler: Any) -> str:
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"prediction_type {kind!r} is not known; epsilon, v_prediction and sample are")
    return kind


# set_alpha_to_one: the last step ends at exactly clean. rescale/thresholding off: a student is what it was trained to be.
_VP_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "renoise": (
        "LCMScheduler",
        {"original_inference_steps": 100, "steps_offset": 1, "clip_sample": False, "thresholding": False},
    ),
    "ddim": (
        "DDIMScheduler",
        {
            "timestep_spacing": "trailing",
            "clip_sample": False,
            "set_alpha_to_one": True,
            "steps_offset": 1,
            "thresholding": False,
        },
    ),
}


def _sd_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return net(x, time, encoder_hidden_states=cond.tensors["prompt"], return_dict=False)[0]


def _sd_encode(pipe: Any, prompts: list[str]) -> Cond:
    embeds, _ = pipe.encode_prompt(prompts, pipe.device, 1, do_classifier_free_guidance=False)
    return Cond({"prompt": embeds})


def _z_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    captions = [e[:n] for e, n in zip(cond.tensors["prompt"], cond.tensors["length"].tolist(), strict=True)]
    # The network's output is the velocity towards data: x0 - eps.
    return -torch.stack(net(list(x.unsqueeze(2).unbind(0)), time, captions, return_dict=False)[0]).squeeze(2)


def _z_encode(pipe: Any, prompts: list[str]) -> Cond:
    length = min(512, pipe.tokenizer.model_max_length)
    embeds, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=length)
    padded = nn.utils.rnn.pad_sequence(embeds, batch_first=True)
    padded = nn.functional.pad(padded, (0, 0, 0, length - padded.shape[1]))
    return Cond({"prompt": padded, "length": torch.tensor([len(e) for e in embeds])})


def _pixel_call(net: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    labels = cond.tensors["label"].to(x.device) if net_config(net).get("num_class_embeds") else None
    out = net(x, time, class_labels=labels, return_dict=False)[0]
    return out[:, : x.shape[1]]  # a learned variance, where there is one, comes behind the mean


def _pixel_encode(pipe: Any, prompts: list[str]) -> Cond:
    """Labels written as numbers; an unconditional network ignores them."""
    return Cond({"label": torch.tensor([int(p) if p.isdigit() else 0 for p in prompts])})


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(
        "unet",
        _sd_call,
        _sd_encode,
        _vp,
        _vp_target,
        _VP_SAMPLERS,
        UNET_LORA,
        lambda c: {"prompt_embeds": torch.zeros(1, 2, c["cross_attention_dim"]), "guidance_scale": 1.0, "output_type": "latent"},
        default_guidance=7.5,
    ),
    "ZImagePipeline": Family(
        "transformer",
        _z_call,
        _z_encode,
        lambda scheduler: RectifiedFlow(clean_time=1.0, noise_time=0.0),
        lambda scheduler: "flow",
        {"ddim": ("FlowMatchEulerDiscreteScheduler", {})},
        ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"),
        lambda c: {"prompt_embeds": [torch.zeros(2, c["cap_feat_dim"])], "guidance_scale": 0.0, "output_type": "latent"},
        guidance=lambda g: g - 1,
        default_guidance=5.0,
    ),
    "DDPMPipeline": Family(
        "unet",
        _pixel_call,
        _pixel_encode,
        _vp,
        _vp_target,
        {"ddim": _VP_SAMPLERS["ddim"]},
        ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
        lambda c: {"output_type": "np"},
        default_guidance=1.0,
        lora_loader=False,
        deployed="DDIMPipeline",
        sized=False,
    ),
}
FAMILIES["DDIMPipeline"] = FAMILIES["DDPMPipeline"]


def net_config(net: Any) -> dict[str, Any]:
    """The Diffusers config of a network, seen through roles and DistributedDataParallel."""
    while not hasattr(net, "config"):
        net = net.module if hasattr(net, "module") else net.net
    return dict(net.config)


def family_of(name: str) -> Family:
    """The entry of a pipeline class. Raises ValueError with the remedy for one that is not known."""
    if name not in FAMILIES:
        raise ValueError(
            f"{name} is not a family fewstep knows ({', '.join(sorted(FAMILIES))}); fewstep/adapters.py is where to add it"
        )
    return FAMILIES[name]


def make_scheduler(family: Family, config: Any, sampler: str) -> Any:
    """The stock scheduler of a sampler, from the config of the teacher's own. Raises ValueError if the family has none."""
    if sampler not in family.samplers:
        raise ValueError(
            f"no stock scheduler of this family computes the sampler {sampler!r}; it has: {', '.join(family.samplers)}"
        )
    name, fixed = family.samplers[sampler]
    return getattr(diffusers, name).from_config(config, **fixed)
