"""Diffusers families: the only file that knows pipeline and model classes. A family is one short entry of FAMILIES."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep.denoiser import Cond, Denoiser, cat
from fewstep.deploy import falling, seen_times
from fewstep.folders import pipeline_name, teacher_folder
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


@dataclass(frozen=True)
class Teacher:
    """A frozen pipeline with what its family knows of it."""

    path: str
    pipe: Any
    family: Family
    schedule: NoiseSchedule
    target: str

    @property
    def net(self) -> Any:
        return getattr(self.pipe, self.family.component)

    def denoiser(self, net: Any) -> Denoiser:
        """A role of this teacher's network as a Denoiser."""
        return Denoiser(net, self.schedule, self.target, self.family.call)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network denoises at the teacher's native resolution."""
        side = net_config(self.net).get("sample_size")
        if side is None:
            vae = self.pipe.vae.config
            side = vae.sample_size // 2 ** (len(vae.block_out_channels) - 1)
        height, width = (side, side) if isinstance(side, int) else side
        return net_config(self.net)["in_channels"], height, width

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) in pixels of a picture."""
        factor = getattr(self.pipe, "vae_scale_factor", 1)
        return self.latent_shape[1] * factor, self.latent_shape[2] * factor

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch: int = 128) -> Cond:
        """Conditions of prompts, computed as the teacher's own pipeline does."""
        return cat([self.family.encode(self.pipe, list(prompts[i : i + batch])) for i in range(0, len(prompts), batch)])

    def null(self) -> Cond:
        """The condition that stands for "no prompt" (leading axis 1)."""
        return self.encode([""])

    @torch.no_grad()
    def to_latents(self, images: np.ndarray, batch: int = 64) -> Tensor:
        """uint8 images (n, h, w, 3) to what the network denoises: scaled posterior means, or pixels in [-1, 1]."""
        vae = getattr(self.pipe, "vae", None)
        parts = []
        for i in range(0, len(images), batch):
            x = torch.from_numpy(images[i : i + batch]).permute(0, 3, 1, 2).float() / 127.5 - 1
            if vae is not None:
                x = vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mean.float()
                x = (x - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
            parts.append(x.cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def to_images(self, latents: Tensor, batch: int = 64) -> np.ndarray:
        """The inverse of `to_latents`: uint8 (n, h, w, 3), rounded as a PNG would be."""
        vae = getattr(self.pipe, "vae", None)
        parts = []
        for x in latents.split(batch):
            if vae is not None:
                z = x / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
                x = vae.decode(z.to(vae.device, vae.dtype)).sample
            x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            parts.append(x.permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)

    def scheduler(self, sampler: str) -> Any:
        """The stock scheduler that computes a sampler's steps for this family. Raises ValueError if there is none."""
        return make_scheduler(self.family, self.pipe.scheduler.config, sampler)

    def grid(self, steps: int, sampler: str) -> tuple[float, ...]:
        """The times t at which the deployed pipeline evaluates the network in `steps` steps: read from it, never typed."""
        vae = getattr(self.pipe, "vae", None)
        kind = type(self.pipe) if self.family.deployed is None else getattr(diffusers, self.family.deployed)
        words = self.family.no_words(net_config(self.net))
        times = seen_times(kind, self.family.component, self.net, vae and vae.config, self.scheduler(sampler), steps, words)
        return falling(self.schedule, times, steps)


def make_scheduler(family: Family, config: Any, sampler: str) -> Any:
    """The stock scheduler of a sampler, from the config of the teacher's own. Raises ValueError if the family has none."""
    if sampler not in family.samplers:
        raise ValueError(
            f"no stock scheduler of this family computes the sampler {sampler!r}; it has: {', '.join(family.samplers)}"
        )
    name, fixed = family.samplers[sampler]
    return getattr(diffusers, name).from_config(config, **fixed)


def load_teacher(path: str, device: str = "cpu") -> Teacher:
    """The frozen teacher at zoo:NAME, a Diffusers folder, or (the only case that uses the network) a hub id."""
    folder = teacher_folder(path)
    if folder is not None:
        family_of(pipeline_name(folder))  # refuse before any weight is read
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder or path, use_safetensors=True, torch_dtype=torch.float32, local_files_only=folder is not None
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        remedy = "save it again with pipe.save_pretrained" if folder else "check the id and the network, or give a folder"
        raise ValueError(f"the teacher {path} cannot be loaded ({str(error).splitlines()[0]}); {remedy}") from error
    family = family_of(type(pipe).__name__)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return Teacher(path, pipe.to(device), family, family.schedule(pipe.scheduler), family.target(pipe.scheduler))


def family_of(name: str) -> Family:
    """The entry of a pipeline class. Raises ValueError with the remedy for one that is not known."""
    if name not in FAMILIES:
        raise ValueError(
            f"{name} is not a family fewstep knows ({', '.join(sorted(FAMILIES))}); fewstep/adapters.py is where to add it"
        )
    return FAMILIES[name]
