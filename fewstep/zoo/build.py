"""Makes the zoo from nothing: `python -m fewstep.zoo.build [STAGE ...] [--work DIR]`, seeded, resumable, about twelve CPU-hours.

Stages, each of which continues where it was stopped: sprites-clip, clouds-clip, sprites-sd, sprites-flow, clouds-sd, clouds-flow,
and ship, which replaces what the package holds of the others named. clouds-sd starts from what is shipped of sprites, and
teaches clouds-flow.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep import swap
from fewstep.adapters import load_teacher
from fewstep.matched import Matched
from fewstep.schedules import RectifiedFlow
from fewstep.zoo import HERE, JUDGES, home
from fewstep.zoo import clip as clips
from fewstep.zoo import vae as vaes
from fewstep.zoo.grammar import Pupil
from fewstep.zoo.recipes import TEACHERS
from fewstep.zoo.sana import Tutor
from fewstep.zoo.sprites import caption, draw, scenes
from fewstep.zoo.teachers import DROPOUT, TEXT_WIDTH
from fewstep.zoo.training import train

POOL_SEEDS, POOL_CHUNK = tuple(range(1000, 1015)), 4000  # 60,000 drawings
VAE_STEPS, VAE_BATCH, VAE_LR = {8: 9000, 4: 3000}, 16, 2e-3
VAE_STEPS_MORE, VAE_LR_MORE = 2000, 1e-3  # of an autoencoder that starts as another world's
IMITATION_STEPS = 5000
CLIP_STEPS, CLIP_BATCH = 1000, 256
TEACHER_BATCH = 64
TEXT_STEPS, TEXT_BATCH, TEXT_LR = 800, 128, 2e-3
CARD = ("README.md", "card.json", "results.json")  # eval/zoo_cards.py writes them


def pool(place: Path) -> np.ndarray:
    """The training drawings (60000, 64, 64, 3) uint8 of the world that the folder `place` is named after, memory-mapped."""
    file = place / "pool.npy"
    if not file.exists():
        scratch = place / "pool.tmp.npy"
        np.save(scratch, np.concatenate([draw(seed, POOL_CHUNK, place.name)[0] for seed in POOL_SEEDS]))
        os.replace(scratch, file)
    return np.load(file, mmap_mode="r")


def pool_captions(world: str, *, texture: bool = False) -> list[str]:
    """The captions of the pool, in its order."""
    return [caption(s, texture=texture) for seed in POOL_SEEDS for s in scenes(seed, POOL_CHUNK, world)[0]]


def begin_as(name: str, part: str, module: torch.nn.Module) -> None:
    """Gives a module the weights of the same part of a shipped teacher."""
    for file in (HERE / name / part).glob("*.safetensors"):
        module.load_state_dict({k: v.float() for k, v in load_file(file).items()})


def build_vae(place: Path, factor: int, begun: str | None):
    """The autoencoder that divides sides by factor, trained and standardised; begun: the teacher whose it starts as."""
    torch.manual_seed(0)
    images, vae = pool(place), vaes.make(factor)
    if begun:
        begin_as(begun, "vae", vae)
    steps, lr = (VAE_STEPS_MORE, VAE_LR_MORE) if begun else (VAE_STEPS[factor], VAE_LR)

    def loss(step: int, rng: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(images), (VAE_BATCH,), generator=rng).numpy()
        return vaes.reconstruction_loss(vae, images[rows], rng)

    train(f"vae{factor}", vae, loss, folder=place, steps=steps, lr=lr, average=0.998)
    mean, std = vaes.encode(vae, images[:2000])
    total = (mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))).sqrt()
    vaes.standardise(vae, mean.mean((0, 2, 3)), total)
    return vae.requires_grad_(False).eval()


def imitate(place: Path, factor: int, of: str) -> tuple[AutoencoderDC, torch.Tensor, torch.Tensor]:
    """A deterministic autoencoder whose latents are those of another teacher's, and these, as of `latents`."""
    torch.manual_seed(0)
    images, vae = pool(place), vaes.make_deterministic(factor)
    mean, std = latents(place, load_teacher(f"zoo:{of}").pipe.vae, f"-{of}")

    def loss(step: int, rng: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(images), (VAE_BATCH,), generator=rng)
        return vaes.imitation_loss(vae, images[rows.numpy()], mean[rows], std[rows], rng)

    train(f"imitation{factor}", vae, loss, folder=place, steps=IMITATION_STEPS, lr=VAE_LR, average=0.998)
    return vae.requires_grad_(False).eval(), mean, std


def tutor(name: str, guidance: float, captions: list[str]) -> Tutor:
    """A shipped teacher as one who teaches another what velocity belongs to these captions."""
    teacher = load_teacher(f"zoo:{name}")
    reader = TEACHERS[name].trainee(teacher.pipe, captions).requires_grad_(False).eval()
    return Tutor(reader, Matched(teacher.guided(teacher.net, guidance), RectifiedFlow()))


def latents(place: Path, vae, key: int | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and deviation of the pool, (60000, C, h, w) each, as an autoencoder that `key` stands for has them."""
    file = place / f"latents{key}.safetensors"
    if not file.exists():
        images = pool(place)
        parts = [vaes.encode(vae, images[i : i + 2000]) for i in range(0, len(images), 2000)]
        scratch = file.with_suffix(".tmp")
        save_file({"mean": torch.cat([p[0] for p in parts]), "std": torch.cat([p[1] for p in parts])}, scratch)
        os.replace(scratch, file)
    stored = load_file(file)
    return stored["mean"], stored["std"]


def build_teacher(name: str, place: Path):
    """A trained pipeline of the zoo on the latents of the pool."""
    recipe = TEACHERS[name]
    captions = pool_captions(home(name))
    vae: Any
    if recipe.tutor:
        vae, mean, std = imitate(place, recipe.factor, recipe.tutor[0])
    else:
        vae = build_vae(place, recipe.factor, recipe.begun.get("vae"))
        mean, std = latents(place, vae, recipe.factor)
    torch.manual_seed(1)
    pipe = recipe.make(vae, **recipe.noise)
    for part, of in recipe.begun.items():
        if part != "vae":
            begin_as(of, part, getattr(pipe, part))
    taught = [tutor(*recipe.tutor, captions)] if recipe.tutor else []
    module: Any = recipe.trainee(pipe, captions, *taught)

    if "text_encoder" not in recipe.begun:
        pupil = Pupil(module.text, TEXT_WIDTH, module.asked)

        def reading(step: int, rng: torch.Generator) -> torch.Tensor:
            rows = 1 + torch.randint(len(mean), (TEXT_BATCH,), generator=rng)
            return pupil.loss(module.hidden(rows), rows)

        train(f"{name}-text", pupil, reading, folder=place, steps=TEXT_STEPS, lr=TEXT_LR)
    module.text.requires_grad_(False)  # as Stable Diffusion's is: a denoiser's first, blind gradients would unteach it

    def loss(step: int, rng: torch.Generator) -> torch.Tensor:
        at = torch.randint(len(mean), (TEACHER_BATCH,), generator=rng)
        x0 = mean[at] + std[at] * torch.randn(mean[at].shape, generator=rng)
        kept = torch.rand(TEACHER_BATCH, generator=rng) >= DROPOUT
        # Fused attention on the CPU is slow backwards in bfloat16: six tenths of a step.
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16), sdpa_kernel(SDPBackend.MATH):
            return module.loss(x0, (at + 1) * kept, rng)

    train(name, module, loss, folder=place, steps=recipe.steps, lr=recipe.lr, weight_decay=1e-3, warmup=200, average=0.999)
    return pipe


def ship(pipe, name: str) -> None:
    """Writes a pipeline to the package as float16 safetensors. What was measured of the one before, its card, stays beside it."""
    target = HERE / name
    swap.restore(target)
    with swap.written(target) as part:
        pipe.to(torch.float16).save_pretrained(part, safe_serialization=True)
        pipe.to(torch.float32)
        for file in CARD:
            if (target / file).exists():
                shutil.copyfile(target / file, part / file)
    print(f"{name} is shipped; `python eval/zoo_cards.py {name}` measures its card anew", flush=True)


STAGES = [*JUDGES, *TEACHERS, "ship"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.zoo.build", description=__doc__)
    parser.add_argument("stages", nargs="*", default=STAGES, metavar="STAGE", help=f"some of: {', '.join(STAGES)}")
    parser.add_argument("--work", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"there is no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    torch.set_num_threads(args.threads)
    for name in (stage for stage in STAGES[:-1] if stage in args.stages):
        place = args.work / home(name)
        place.mkdir(parents=True, exist_ok=True)
        if name in JUDGES:
            texts = (pool_captions(place.name), pool_captions(place.name, texture=True))
            model = clips.train_clip(place / "clip", steps=CLIP_STEPS, batch=CLIP_BATCH, images=pool(place), captions=texts)
            if "ship" in args.stages:
                with swap.written(HERE / name) as part:
                    clips.save(model, part)
        else:
            pipe = build_teacher(name, place)
            if "ship" in args.stages:
                ship(pipe, name)


if __name__ == "__main__":
    main()
