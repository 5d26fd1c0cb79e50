"""Makes the zoo from nothing: `python -m fewstep.zoo.build [STAGE ...] [--work DIR]`, seeded, resumable, about three CPU-hours.

Stages, each of which continues where it was stopped: pool, vae, latents, sprites-clip, sprites-sd, sprites-flow, ship.
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

from fewstep.zoo import HERE, teachers
from fewstep.zoo import clip as clips
from fewstep.zoo import vae as vaes
from fewstep.zoo.sprites import caption, draw, scenes
from fewstep.zoo.training import train

POOL_SEEDS, POOL_CHUNK = tuple(range(1000, 1015)), 4000  # 60,000 drawings
VAE_STEPS, VAE_BATCH, VAE_LR = 4600, 16, 2e-3
CLIP_STEPS, CLIP_BATCH = 1000, 256
TEACHER_STEPS = {"sprites-sd": 7700, "sprites-flow": 6500}
TEACHER_BATCH, TEACHER_LR = 64, 2e-3


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


def build_vae(work: Path):
    """The autoencoder, trained and standardised."""
    torch.manual_seed(0)
    images, vae = pool(work), vaes.make()

    def loss(step: int, rng: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(images), (VAE_BATCH,), generator=rng).numpy()
        return vaes.reconstruction_loss(vae, images[rows], rng)

    train("vae", vae, loss, folder=work, steps=VAE_STEPS, lr=VAE_LR, average=0.998)
    mean, std = vaes.encode(vae, images[:2000])
    total = (mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))).sqrt()
    vaes.standardise(vae, mean.mean((0, 2, 3)), total)
    return vae.requires_grad_(False).eval()


def latents(work: Path, vae) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and deviation of the pool, (60000, 4, 8, 8) each."""
    file = work / "latents.safetensors"
    if not file.exists():
        images = pool(work)
        parts = [vaes.encode(vae, images[i : i + 2000]) for i in range(0, len(images), 2000)]
        save_file({"mean": torch.cat([p[0] for p in parts]), "std": torch.cat([p[1] for p in parts])}, file)
    stored = load_file(file)
    return stored["mean"], stored["std"]


def build_teacher(name: str, work: Path, vae):
    """A trained pipeline of the zoo on the pool's latents."""
    torch.manual_seed(1)
    make, trainee = teachers.TEACHERS[name]
    pipe = make(vae)
    mean, std = latents(work, vae)
    module: Any = trainee(pipe, pool_captions())

    def loss(step: int, rng: torch.Generator) -> torch.Tensor:
        at = torch.randint(len(mean), (TEACHER_BATCH,), generator=rng)
        x0 = mean[at] + std[at] * torch.randn(mean[at].shape, generator=rng)
        kept = torch.rand(TEACHER_BATCH, generator=rng) >= teachers.DROPOUT
        return module.loss(x0, (at + 1) * kept, rng)

    train(name, module, loss, folder=work, steps=TEACHER_STEPS[name], lr=TEACHER_LR, weight_decay=1e-3, warmup=200, average=0.999)
    return pipe


def ship(pipe, name: str) -> None:
    """Writes a pipeline to the package as float16 safetensors."""
    target = HERE / name
    shutil.rmtree(target, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(target, safe_serialization=True)
    pipe.to(torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.zoo.build", description=__doc__)
    parser.add_argument(
        "stages", nargs="*", default=["pool", "vae", "latents", "sprites-clip", "sprites-sd", "sprites-flow", "ship"]
    )
    parser.add_argument("--work", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    pool(args.work)
    if "sprites-clip" in args.stages:
        texts = (pool_captions(), pool_captions(texture=True))
        model = clips.train_clip(args.work / "clip", steps=CLIP_STEPS, batch=CLIP_BATCH, images=pool(args.work), captions=texts)
        if "ship" in args.stages:
            clips.save(model, HERE / "sprites-clip")
    if set(args.stages) - {"pool", "sprites-clip"}:
        vae = build_vae(args.work)
        if set(args.stages) - {"pool", "vae", "sprites-clip"}:
            latents(args.work, vae)
        for name in teachers.TEACHERS:
            if name in args.stages or "ship" in args.stages:
                pipe = build_teacher(name, args.work, vae)
                if "ship" in args.stages:
                    ship(pipe, name)


if __name__ == "__main__":
    main()
