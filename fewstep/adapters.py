"""Teachers: a frozen Diffusers pipeline with what its family knows of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep import embedders
from fewstep.denoiser import Cond, Denoiser, Guided, cat
from fewstep.deploy import falling, seen_times
from fewstep.experts import Relay
from fewstep.families import Family, Setting, bare, family_of, make_scheduler, net_config, setting_of
from fewstep.folders import exported_guidance, pipeline_name, teacher_folder
from fewstep.schedules import NoiseSchedule
from fewstep.shapes import sizes_of


@dataclass(frozen=True)
class Teacher:
    """A frozen pipeline with what its family knows of it.

    first: the network's timestep at which a student is deployed to be handed pure noise; None: the noise end of the schedule."""

    path: str
    pipe: Any
    family: Family
    schedule: NoiseSchedule
    target: str
    setting: Setting
    first: int | None = None

    @property
    def net(self) -> Any:
        """The network that is distilled; of a pipeline of two, both as one."""
        return getattr(self.pipe, self.family.component) if len(self.components) == 1 else self._relay

    @cached_property
    def _relay(self) -> Relay:
        return Relay({k: getattr(self.pipe, k) for k in self.components}, self.pipe.config.boundary_ratio)

    @property
    def components(self) -> tuple[str, ...]:
        """The names of what is distilled."""
        second = self.family.second
        return (self.family.component, *([second] if second and getattr(self.pipe, second) is not None else []))

    def denoiser(self, net: Any, guidance: float | None = None, grid: tuple[float, ...] = ()) -> Denoiser:
        """A role of this teacher's network as a Denoiser. guidance, grid: what it is fed by default if it takes such inputs."""
        takes = embedders.inputs(bare(net))
        scale = guidance if embedders.GUIDANCE in takes else None
        ends, switches = grid if embedders.END in takes else (), getattr(bare(net), "switches", ())
        return Denoiser(net, self.schedule, self.target, self.family.call, None, scale, ends, switches)

    def guided(self, net: Any, scale: float | None = None, null: Cond | None = None) -> Denoiser | Guided:
        """A role of this network under guidance: both halves mixed as its pipeline does it, or one pass of a network that
        was distilled to take the scale."""
        scale = self.guidance if scale is None else scale
        denoiser = self.denoiser(net, scale)
        if denoiser.guidance is not None:
            return denoiser
        return Guided(denoiser, scale, self.null() if null is None else null, self.family.renorm)

    @property
    def guidance(self) -> float:
        """The scale this teacher is meant for: its card's in the zoo, an export's own, else its family's default; 1 where
        it is embedded."""
        if self.family.embedded:
            return 1.0
        from fewstep.zoo import guidance

        zoo = self.path.startswith("zoo:")
        own = guidance(self.path.removeprefix("zoo:")) if zoo else exported_guidance(Path(self.path))
        return self.family.default_guidance if own is None else own

    def keep(self, *names: str) -> None:
        """Lets go of the pipeline's networks, but for the named ones and the one that is distilled."""
        networks = [k for k, v in self.pipe.components.items() if isinstance(v, nn.Module)]
        self.pipe.register_modules(**{k: None for k in networks if k not in (*names, *self.components)})

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, H, W), or (C, F, H, W) for video, of what the network denoises."""
        return self.family.latents(net_config(self.net), _vae_config(self.pipe), self.setting.size)

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) in pixels of a picture."""
        return self.setting.size[-2], self.setting.size[-1]

    def at(self, size: tuple[int, ...]) -> Teacher:
        """The same teacher, asked for pictures of another size."""
        return replace(self, setting=replace(self.setting, size=size))

    def sizes(self, aspect: float) -> tuple[tuple[int, ...], ...]:
        """Its own size and others of about that area; see `shapes.sizes_of`."""
        return sizes_of(self.family, net_config(self.net), _vae_config(self.pipe), self.setting.size, aspect)

    def resized(self, cond: Cond) -> Cond:
        """Conditions that were made for another size, for this one."""
        return self.family.resized(cond, self.setting)

    def call(self, scale: float) -> dict[str, Any]:
        """Keyword arguments under which the stock pipeline draws such pictures at this scale of guidance (1 = none)."""
        guide = self.family.guide(self.setting.guidance if self.family.embedded else scale)
        return {**guide, **self.family.arguments(self.setting)}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch: int = 128) -> Cond:
        """Conditions of prompts, computed as the teacher's own pipeline does."""
        parts = [list(prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
        return cat([self.family.encode(self.pipe, part, self.setting) for part in parts])

    @torch.no_grad()
    def null(self) -> Cond:
        """The condition that stands for "no prompt" (leading axis 1), as the teacher's own pipeline makes it."""
        return self.encode([""]) if self.family.null is None else self.family.null(self.pipe, self.setting)

    @property
    def at_once(self) -> int:
        """How many pictures at most the autoencoder is given at a time: what it holds grows with their pixels."""
        return max(1, min(64, 2**18 // math.prod(self.setting.size)))

    @torch.no_grad()
    def to_latents(self, images: np.ndarray, batch: int = 64) -> Tensor:
        """uint8 images (n, h, w, 3) to what the network denoises: scaled posterior means, or pixels in [-1, 1].

        Raises ValueError for a teacher of videos."""
        if len(self.setting.size) == 3:
            raise ValueError(f"{type(self.pipe).__name__} makes videos, a picture is none; use data.prompts, or teacher pairs")
        parts = []
        batch = min(batch, self.at_once)
        for i in range(0, len(images), batch):
            x = torch.from_numpy(images[i : i + batch]).permute(0, 3, 1, 2).float() / 127.5 - 1
            parts.append(self.family.encode_pixels(self.pipe, x).float().cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """float32 in [0, 1]: images (n, 3, h, w), or videos (n, frames, 3, h, w); what output_type="pt" gives."""
        return (self.family.decode(self.pipe, latents).float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def to_images(self, latents: Tensor, batch: int = 64) -> np.ndarray:
        """uint8 (n, h, w, 3), rounded as a PNG would be; of a video its middle frame."""
        parts = []
        for x in latents.split(min(batch, self.at_once)):
            images = self.decode(x)
            images = images if images.ndim == 4 else images[:, images.shape[1] // 2]
            parts.append((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)

    def scheduler(self, sampler: str) -> Any:
        """The stock scheduler that computes a sampler's steps for this family. Raises ValueError if there is none."""
        return make_scheduler(self.family, self.pipe.scheduler.config, sampler, self.first)

    def deployed_grid(self, steps: int, sampler: str) -> tuple[float, ...]:
        """`grid` for a student to be exported. Raises ValueError for a count whose stock steps are not the library's."""
        levels = getattr(self.schedule, "num_levels", steps) if self.first is None else self.first + 1
        if sampler == "ddim" and levels % steps:
            # DDIMScheduler jumps to t - levels // steps, which is then not the next time it visits.
            raise ValueError(
                f"{steps} does not divide this teacher's {levels} levels, and stock DDIM would step otherwise than trained; "
                "use 1, 2, 4, 5 or 8 steps"
            )
        return self.grid(steps, sampler)

    def grid(self, steps: int, sampler: str) -> tuple[float, ...]:
        """The times t at which the deployed pipeline evaluates the network in `steps` steps: read from it, never typed."""
        kind = type(self.pipe) if self.family.deployed is None else getattr(diffusers, self.family.deployed)
        vae = getattr(self.pipe, "vae", None)
        times = seen_times(kind, self.family, self.net, vae, self.scheduler(sampler), steps, self.setting, sampler)
        return falling(self.schedule, times, steps)


def _vae_config(pipe: Any) -> dict[str, Any]:
    vae = getattr(pipe, "vae", None)
    return {} if vae is None else dict(vae.config)


def load_teacher(
    path: str, device: str = "cpu", *, size: tuple[int, ...] | None = None, guidance: float | None = None
) -> Teacher:
    """The frozen teacher at zoo:NAME, a Diffusers folder, or (the only case that uses the network) a hub id.

    size: ([frames,] height, width) in pixels, the teacher's own by default. guidance: what is fed to a network that takes it as
    an input; elsewhere not read. Raises ValueError for what cannot be a teacher."""
    folder = teacher_folder(path)
    if folder is not None:
        family_of(pipeline_name(folder))  # refuse before any weight is read
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder or path, use_safetensors=True, dtype=torch.float32, local_files_only=folder is not None
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        remedy = "save it again with pipe.save_pretrained" if folder else "check the id and the network, or give a folder"
        raise ValueError(f"the teacher {path} cannot be loaded ({str(error).splitlines()[0]}); {remedy}") from error
    return teacher_of(path, pipe.to(device), size=size, guidance=guidance)


def teacher_of(path: str, pipe: Any, *, size: tuple[int, ...] | None = None, guidance: float | None = None) -> Teacher:
    """A pipeline as a frozen teacher; see `load_teacher`."""
    family = family_of(type(pipe).__name__)
    if reason := family.refuse(pipe):
        raise ValueError(f"the teacher {path} cannot be distilled: {reason}")
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    embedders.gain(getattr(pipe, family.component))  # a distilled one may take the guidance scale
    setting = setting_of(family, net_config(getattr(pipe, family.component)), _vae_config(pipe), size, guidance)
    return Teacher(path, pipe, family, family.schedule(pipe.scheduler), family.target(pipe.scheduler), setting)
