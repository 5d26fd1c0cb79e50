"""How the zoo's teachers are made: a recipe each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep.zoo.sana import Sana, sana
from fewstep.zoo.teachers import StableDiffusion, ZImage, stable_diffusion, z_image


@dataclass(frozen=True)
class Recipe:
    """How a teacher is made: its untrained pipeline, what is trained of it, by what its autoencoder divides sides, for how many
    steps, at which learning rate, and whether in bfloat16.

    begun: parts that start as those of another teacher of the zoo; a text encoder that does stays as it is. noise: settings of
    its scheduler. tutor: the teacher of the zoo whose latents its autoencoder imitates, and whose velocity under this guidance
    scale it learns in the place of the data's."""

    make: Callable[..., Any]
    trainee: Callable[[Any, list[str]], Any]
    factor: int
    steps: int
    lr: float = 2e-3
    bf16: bool = False
    begun: Mapping[str, str] = field(default_factory=dict)
    noise: Mapping[str, Any] = field(default_factory=dict)
    tutor: tuple[str, float] | None = None


# Stable Diffusion's schedule is for 64x64 latents: 16x16 of them are decided at a quarter of the noise, and four of its steps are
# nearly as good as fifty. So clouds-sd has the cosine schedule (Nichol and Dhariwal 2021, section 3.2), made for small pictures.
# What is shipped of it was trained in three legs: 5,000 steps with epsilon and Stable Diffusion's schedule, which taught it
# shapes, then 3,600 and 10,000 as below; that as many of one kind do as well was not tried.
# A shift of 0.5 does so for a flow (Esser et al. 2024, eq. 23: the root of the ratio of pixels to 32x32, where SD3 began).
# clouds-flow's velocities were made by another process meanwhile, the last 200,000 of them at hand, those of its first 5,200
# steps under guidance 1.25; after 9,000 of what were to be 13,000 its rate began to fall to nothing at 11,500. Another like
# it that learnt from pictures alone had FD 88 in 25 steps (500 samples) after 16,000 steps, this one 90 after 5,000 at full rate.
TEACHERS = {
    "sprites-sd": Recipe(stable_diffusion, StableDiffusion, 8, 12000),
    "sprites-flow": Recipe(z_image, ZImage, 4, 11000),
    "clouds-sd": Recipe(
        stable_diffusion,
        StableDiffusion,
        4,
        18600,
        1.5e-3,
        bf16=True,
        begun={"vae": "sprites-flow", "text_encoder": "sprites-sd"},
        noise={"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    ),
    "clouds-flow": Recipe(sana, Sana, 4, 11500, bf16=True, noise={"shift": 0.5}, tutor=("clouds-sd", 1.5)),
}
