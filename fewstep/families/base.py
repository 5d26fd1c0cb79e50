"""What a family is: how one Diffusers pipeline class is read, called, sized and deployed, and what most families share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from fewstep.denoiser import Cond
from fewstep.sampling import uniform_grid
from fewstep.schedules import DiscreteVP, NoiseSchedule, RectifiedFlow

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """What a pipeline is told besides the prompt: size, ([frames,] height, width) in pixels, and the guidance that is fed to
    the network where a family embeds it (else it is not read)."""

    size: tuple[int, ...]
    guidance: float = 1.0


def bare(net: Any) -> Any:
    """The Diffusers network itself, seen through roles and DistributedDataParallel."""
    while not hasattr(net, "config"):
        net = net.module if hasattr(net, "module") else net.net
    return net


def net_config(net: Any) -> dict[str, Any]:
    """The Diffusers config of a network, seen as `bare` does."""
    return dict(bare(net).config)


def spatial_factor(vae: Config) -> int:
    """Pixels a latent's side stands for, from the autoencoder's config; 1 without one."""
    blocks = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    return 2 ** (len(blocks) - 1) if blocks else 1


def native_size(net: Config, vae: Config) -> tuple[int, ...]:
    """(height, width) that a network says it was trained at, else its autoencoder."""
    side = net.get("sample_size")
    factor = spatial_factor(vae)
    if side is None:
        side = vae["sample_size"] // factor
    height, width = (side, side) if isinstance(side, int) else side
    return height * factor, width * factor


def latent_shape(net: Config, vae: Config, size: tuple[int, ...]) -> tuple[int, ...]:
    """(C, H, W) of what the network denoises for a picture of this size."""
    factor = spatial_factor(vae)
    return net["in_channels"], size[0] // factor, size[1] // factor


def kl_encode(pipe: Any, x: Tensor) -> Tensor:
    """Scaled and shifted posterior means (B, C, H, W) of images (B, 3, H, W) in [-1, 1]; the images where there is no VAE."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return x
    mean = vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mean.float()
    return (mean - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def kl_decode(pipe: Any, x: Tensor) -> Tensor:
    """The inverse of `kl_encode`."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return x
    z = x / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    return vae.decode(z.to(vae.device, vae.dtype)).sample


def standardised(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std) a channel of the raw latents of autoencoders that state them, shaped for x (B, C, F, H, W)."""
    mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device) for v in (vae.config.latents_mean, vae.config.latents_std))
    return mean.reshape(1, -1, 1, 1, 1), std.reshape(1, -1, 1, 1, 1)


EXAMPLES = ("a small red circle left of a large blue square on a grey background", "a large green triangle on a white background")


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one pipeline class is read, called, sized and deployed. x is always (B, C, H, W), or (B, C, F, H, W) for video.

    component: the attribute that is distilled; second: that of a network for the cleaner times, which some pipelines have. call:
    see Denoiser. encode: (pipe, prompts, setting) -> Cond; null: the same for "no prompt" as the pipeline itself makes it (None:
    the empty prompt), without what is not about words. resized: such conditions for a picture of another size. schedule, target:
    from the pipeline's scheduler.
    samplers: sampler name -> (scheduler class, config) for the deployed pipeline, the default one first. spaced: those whose
    scheduler the call must hand its sigmas, since the pipeline does not.
    no_words: from the network's config, keyword arguments that stand in for a prompt when only the pipeline's loop matters.
    guide: our scale (1 = none) as keyword arguments of the pipeline's call; renorm: what the pipeline does to a guided output
    (conditional, guided) -> guided. embedded: guidance is an input of the network, and there is no second pass.
    tokens: (pipe, prompts) -> (how many each prompt has, how many are read), where one tokenizer alone decides.
    size, latents: see `native_size`, `latent_shape`. pack: x -> the pipeline's own `latents`; walked: x -> what its scheduler
    steps, where that is not the same. encode_pixels, decode: images
    (B, 3, H, W) in [-1, 1] to x, and back (video: (B, F, 3, H, W)). options: further fixed arguments of the call.
    ask: (pipe, prompts) as keyword arguments of the call. examples: two prompts for which an export is proved."""

    component: str = "transformer"
    second: str | None = None
    call: Callable[[Any, Tensor, Tensor, Cond], Tensor]
    encode: Callable[[Any, list[str], Setting], Cond]
    null: Callable[[Any, Setting], Cond] | None = None
    resized: Callable[[Cond, Setting], Cond] = lambda cond, setting: cond
    schedule: Callable[[Any], NoiseSchedule]
    target: Callable[[Any], str]
    samplers: dict[str, tuple[str, dict[str, Any]]]
    spaced: tuple[str, ...] = ()
    lora_targets: tuple[str, ...]
    no_words: Callable[[Config], dict[str, Any]]
    guide: Callable[[float], dict[str, Any]] = lambda g: {"guidance_scale": g}
    renorm: Callable[[Tensor, Tensor], Tensor] | None = None
    tokens: Callable[[Any, list[str]], tuple[list[int], int]] | None = None
    embedded: bool = False
    default_guidance: float = 7.5
    lora_loader: bool = True
    deployed: str | None = None  # the pipeline class that runs students, where it is not the teacher's
    sized: bool = True  # the pipeline's call takes height and width
    size: Callable[[Config, Config], tuple[int, ...]] = native_size
    latents: Callable[[Config, Config, tuple[int, ...]], tuple[int, ...]] = latent_shape
    pack: Callable[[Tensor], Tensor] = lambda x: x
    walked: Callable[[Tensor], Tensor] | None = None
    encode_pixels: Callable[[Any, Tensor], Tensor] = kl_encode
    decode: Callable[[Any, Tensor], Tensor] = kl_decode
    options: Config = field(default_factory=dict)
    ask: Callable[[Any, list[str]], dict[str, Any]] = lambda pipe, prompts: {"prompt": prompts}
    examples: tuple[str, str] = EXAMPLES
    refuse: Callable[[Any], str | None] = lambda pipe: None  # why this very pipeline cannot be distilled, as a sentence

    def arguments(self, setting: Setting) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call for a picture of this size, without guidance and prompt."""
        names = ("num_frames", "height", "width")[-len(setting.size) :]
        return {**(dict(zip(names, setting.size, strict=True)) if self.sized else {}), **self.options}

    def spacing(self, sampler: str, steps: int) -> dict[str, Any]:
        """What the call is told of the times besides their number; the scheduler shifts them."""
        return {"sigmas": list(uniform_grid(steps))} if sampler in self.spaced else {}


def setting_of(family: Family, net: Config, vae: Config, size: tuple[int, ...] | None, guidance: float | None) -> Setting:
    """What a pipeline of these configs is told, its own where nothing is wished. Raises ValueError for a size it cannot make."""
    native = family.size(net, vae)
    if size is not None and len(size) != len(native):
        wanted = "[frames, height, width]" if len(native) == 3 else "[height, width]"
        raise ValueError(f"teacher.size is {wanted} for this teacher (its own: {list(native)}), not {list(size)}")
    if size not in (None, native) and not family.sized:
        raise ValueError(f"this teacher draws at its own size alone, {list(native)}, not {list(size)}; leave teacher.size away")
    setting = Setting(size or native, family.default_guidance if guidance is None else guidance)
    if min(family.latents(net, vae, setting.size)) < 1:
        raise ValueError(f"teacher.size {list(setting.size)} is too small for this teacher; its own is {list(native)}")
    return setting


# Schedules and targets


def vp(scheduler: Any) -> DiscreteVP:
    """The table of a DDPM-like scheduler."""
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise ValueError(
            f"{type(scheduler).__name__} has no table of noise levels; save the teacher with its DDIM or DDPM scheduler"
        )
    return DiscreteVP(tuple(torch.as_tensor(table, dtype=torch.float64).tolist()))


def vp_target(scheduler: Any) -> str:
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"prediction_type {kind!r} is not known; epsilon, v_prediction and sample are")
    return kind


def flow(clean_time: float, noise_time: float) -> Callable[[Any], RectifiedFlow]:
    """The straight path under a clock that shows `clean_time` at data and `noise_time` at noise."""
    return lambda scheduler: RectifiedFlow(clean_time, noise_time)


def flow_target(scheduler: Any) -> str:
    return "flow"


# set_alpha_to_one: the last step ends at exactly clean. rescale/thresholding off: a student is what it was trained to be.
VP_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
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
# For pipelines that hand their scheduler linspace(1, 1/n, n). A terminal shift would stretch that until the last of few steps
# lies next to clean, where nothing is left to do; of one step it makes 0 / 0.
# Most of these hand it no generator: what it draws is then torch's own, which torch.manual_seed seeds as well.
FLOW_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": None}),
    "renoise": ("FlowMatchLCMScheduler", {"shift_terminal": None, "scale_factors": None}),
}
# For those that ask it for n steps: FlowMatchEuler and FlowMatchLCM would waste the last one at the smallest time of training.
PLAIN_FLOW_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {"ddim": ("FlowMapEulerDiscreteScheduler", {})}
# For those of them whose call takes sigmas, so that it can be told where to go; see Family.spaced.
SPACED_FLOW_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    **PLAIN_FLOW_SAMPLERS,
    "renoise": (
        "FlowMatchLCMScheduler",
        {
            "shift_terminal": None,
            "scale_factors": None,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
        },
    ),
}


def make_scheduler(family: Family, config: Any, sampler: str, first: int | None = None) -> Any:
    """The stock scheduler of a sampler, from the config of the teacher's own; first: see `cut`. Raises ValueError if the family
    has none."""
    if sampler not in family.samplers:
        raise ValueError(
            f"no stock scheduler of this family computes the sampler {sampler!r}; it has: {', '.join(family.samplers)}"
        )
    name, fixed = family.samplers[sampler]
    kind = getattr(diffusers, name)
    takes = inspect.signature(kind.__init__).parameters
    if "shift" in takes and config.get("flow_shift") is not None:  # solvers and Euler schedulers call it by two names
        fixed = {"shift": config["flow_shift"], **fixed}
    if name == "FlowMapEulerDiscreteScheduler":
        if config.get("use_dynamic_shifting"):
            raise ValueError(
                "this teacher's time shift depends on the picture's size, which no stock scheduler computes in few steps for its "
                "pipeline; save the teacher with use_dynamic_shifting=False and the shift of the size you want"
            )
        config = {k: v for k, v in config.items() if k in takes}
    made = kind.from_config(config, **fixed)
    return made if first is None else cut(made, first)


def cut(scheduler: Any, first: int) -> Any:
    """The same scheduler with the noisier end of its table cut off, so that it hands the network pure noise at the timestep
    `first`. Raises ValueError where there is no table, or no such place in it."""
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise ValueError(
            f"student.conditioning_timestep is a place in a table of noise levels, which {type(scheduler).__name__} has not; "
            "leave it away for this teacher"
        )
    if not 0 < first < len(table):
        raise ValueError(f"student.conditioning_timestep is a timestep of this teacher's, 1 to {len(table) - 1}, not {first}")
    kept = torch.cat([torch.ones(1), table[: first + 1]]).double()
    betas = {"num_train_timesteps": first + 1, "trained_betas": (1 - kept[1:] / kept[:-1]).tolist()}
    done = {"rescale_betas_zero_snr": False, "snr_shift_scale": 1.0}  # what was done to the table is in it
    return type(scheduler).from_config(scheduler.config, **betas, **{k: v for k, v in done.items() if k in scheduler.config})


# Packed latents: FLUX and its relatives see 2x2 blocks of pixels as one token.


def pack(x: Tensor) -> Tensor:
    """(B, C, H, W) to tokens (B, H/2 W/2, 4C)."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse of `pack`, for an x of the shape of `like`."""
    b, c, h, w = like.shape
    return tokens.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)
