"""Makes the zoo from nothing: `python -m fewstep.zoo.build [STAGE ...] [--work DIR]`, seeded, resumable, about four CPU-hours.

Stages, each of which continues where it was stopped: sprites-clip, sprites-sd, sprites-flow, and ship, which replaces what the
package holds of the others named.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fewstep import swap
from fewstep.zoo import HERE, teachers
from fewstep.zoo import clip as clips
from fewstep.zoo import vae as vaes
from fewstep.zoo.grammar import Pupil
from fewstep.zoo.sprites import caption, draw, scenes
from fewstep.zoo.training import train

POOL_SEEDS, POOL_CHUNK = tuple(range(1000, 1015)), 4000  # 60,000 drawings
VAE_STEPS, VAE_BATCH, VAE_LR = {8: 9000, 4: 3000}, 16, 2e-3
CLIP_STEPS, CLIP_BATCH = 1000, 256
TEACHER_STEPS = {"sprites-sd": 12000, "sprites-flow": 11000}
TEACHER_BATCH, TEACHER_LR = 64, 2e-3
TEXT_STEPS, TEXT_BATCH = 800, 128
CARD = ("README.md", "card.json", "results.json")  # eval/zoo_cards.py writes them


def pool(work: Path) -> np.ndarray:
    """The training drawings (60000, 64, 64, 3) uint8, memory-mapped."""
    file = work / "pool.npy"
    if not file.exists():
        scratch = work / "pool.tmp.npy"
        np.save(scratch, np.concatenate([draw(seed, POOL_CHUNK)[0] for seed in POOL_SEEDS]))
        os.replace(scratch, file)
    return np.load(file, mmap_mode="r")


def pool_captions(*, texture: bool = False) -> list[str]:
    """The captions of the pool, in its order."""
    return [caption(s, texture=texture) for seed in POOL_SEEDS for s in scenes(seed, POOL_CHUNK)[0]]


def build_vae(work: Path, factor: int):
    """The autoencoder that divides sides by factor, trained and standardised."""
    torch.manual_seed(0)
    images, vae = pool(work), vaes.make(factor)

    def loss(step: int, rng: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(images), (VAE_BATCH,), generator=rng).numpy()
        return vaes.reconstruction_loss(vae, images[rows], rng)

    train(f"vae{factor}", vae, loss, folder=work, steps=VAE_STEPS[factor], lr=VAE_LR, average=0.998)
    mean, std = vaes.encode(vae, images[:2000])
    total = (mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))).sqrt()
    vaes.standardise(vae, mean.mean((0, 2, 3)), total)
    return vae.requires_grad_(False).eval()


def latents(work: Path, vae, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and deviation of the pool, (60000, C, 64 / factor, 64 / factor) each."""
    file = work / f"latents{factor}.safetensors"
    if not file.exists():
        images = pool(work)
        parts = [vaes.encode(vae, images[i : i + 2000]) for i in range(0, len(images), 2000)]
        scratch = file.with_suffix(".tmp")
        save_file({"mean": torch.cat([p[0] for p in parts]), "std": torch.cat([p[1] for p in parts])}, scratch)
        os.replace(scratch, file)
    stored = load_file(file)
    return stored["mean"], stored["std"]


def build_teacher(name: str, work: Path):
    """A trained pipeline of the zoo on the latents of the pool."""
    make, trainee, factor = teachers.TEACHERS[name]
    vae = build_vae(work, factor)
    mean, std = latents(work, vae, factor)
    torch.manual_seed(1)
    pipe = make(vae)
    module: Any = trainee(pipe, pool_captions())
    pupil = Pupil(module.text, teachers.TEXT_WIDTH, module.asked)

    def reading(step: int, rng: torch.Generator) -> torch.Tensor:
        rows = 1 + torch.randint(len(mean), (TEXT_BATCH,), generator=rng)
        return pupil.loss(module.hidden(rows), rows)

    train(f"{name}-text", pupil, reading, folder=work, steps=TEXT_STEPS, lr=TEACHER_LR)
    module.text.requires_grad_(False)  # as Stable Diffusion's is: a denoiser's first, blind gradients would unteach it

    def loss(step: int, rng: torch.Generator) -> torch.Tensor:
        at = torch.randint(len(mean), (TEACHER_BATCH,), generator=rng)
        x0 = mean[at] + std[at] * torch.randn(mean[at].shape, generator=rng)
        kept = torch.rand(TEACHER_BATCH, generator=rng) >= teachers.DROPOUT
        return module.loss(x0, (at + 1) * kept, rng)

    train(name, module, loss, folder=work, steps=TEACHER_STEPS[name], lr=TEACHER_LR, weight_decay=1e-3, warmup=200, average=0.999)
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


STAGES = ["sprites-clip", *teachers.TEACHERS, "ship"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.zoo.build", description=__doc__)
    parser.add_argument("stages", nargs="*", default=STAGES, metavar="STAGE", help=f"some of: {', '.join(STAGES)}")
    parser.add_argument("--work", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"there is no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    pool(args.work)
    if "sprites-clip" in args.stages:
        texts = (pool_captions(), pool_captions(texture=True))
        model = clips.train_clip(args.work / "clip", steps=CLIP_STEPS, batch=CLIP_BATCH, images=pool(args.work), captions=texts)
        if "ship" in args.stages:
            with swap.written(HERE / "sprites-clip") as part:
                clips.save(model, part)
    for name in teachers.TEACHERS:
        if name in args.stages:
            pipe = build_teacher(name, args.work)
            if "ship" in args.stages:
                ship(pipe, name)


if __name__ == "__main__":
    main()
