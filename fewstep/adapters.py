"""Teachers: a frozen Diffusers pipeline with what its family knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep.denoiser import Cond, Denoiser, cat
from fewstep.deploy import falling, seen_times
from fewstep.families import Family, family_of, make_scheduler, net_config
from fewstep.folders import pipeline_name, teacher_folder
from fewstep.schedules import NoiseSchedule


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
    def guidance(self) -> float:
        """The scale this teacher is meant for: its card's in the zoo, else its family's default."""
        from fewstep.zoo import guidance

        own = guidance(self.path.removeprefix("zoo:")) if self.path.startswith("zoo:") else None
        return self.family.default_guidance if own is None else own

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

    def deployed_grid(self, steps: int, sampler: str) -> tuple[float, ...]:
        """`grid` for a student to be exported. Raises ValueError for a count whose stock steps are not the library's."""
        levels = getattr(self.schedule, "num_levels", steps)
        if sampler == "ddim" and levels % steps:
            # DDIMScheduler jumps to t - levels // steps, which is then not the next time it visits.
            raise ValueError(
                f"{steps} does not divide this teacher's {levels} levels, and stock DDIM would step otherwise than trained; "
                "use 1, 2, 4, 5 or 8 steps"
            )
        return self.grid(steps, sampler)

    def grid(self, steps: int, sampler: str) -> tuple[float, ...]:
        """The times t at which the deployed pipeline evaluates the network in `steps` steps: read from it, never typed."""
        vae = getattr(self.pipe, "vae", None)
        kind = type(self.pipe) if self.family.deployed is None else getattr(diffusers, self.family.deployed)
        words = self.family.no_words(net_config(self.net))
        times = seen_times(kind, self.family.component, self.net, vae and vae.config, self.scheduler(sampler), steps, words)
        return falling(self.schedule, times, steps)


def load_teacher(path: str, device: str = "cpu") -> Teacher:
    """The frozen teacher at zoo:NAME, a Diffusers folder, or (the only case that uses the network) a hub id."""
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
    family = family_of(type(pipe).__name__)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return Teacher(path, pipe.to(device), family, family.schedule(pipe.scheduler), family.target(pipe.scheduler))
