"""The zoo's autoencoders: stock AutoencoderKLs, 64x64 RGB to 8x8x8 or 16x16x4 latents, and a deterministic AutoencoderDC."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL

# A linear code of 8x8 patches loses 4.8 % of the drawings' variance with four channels, 2.8 % with eight: four lost textures. The
# transformer cuts its latents into patches of 2x2: 8x8 of them are 16 tokens, which drew neither shapes nor relations.
BLOCKS = {8: (16, 16, 48, 96), 4: (16, 32, 64)}
CHANNELS = {8: 8, 4: 4}


def make(factor: int) -> AutoencoderKL:
    """An untrained AutoencoderKL that divides sides by factor, 8 (1.4 M parameters) or 4 (0.6 M)."""
    blocks = BLOCKS[factor]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        block_out_channels=blocks,
        layers_per_block=1,
        latent_channels=CHANNELS[factor],
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def make_deterministic(factor: int) -> AutoencoderDC:
    """An untrained AutoencoderDC (0.3 M parameters at 4) that divides sides by factor, as a SanaPipeline wants."""
    blocks = BLOCKS[factor]
    return AutoencoderDC(
        latent_channels=CHANNELS[factor],
        encoder_block_out_channels=blocks,
        decoder_block_out_channels=blocks,
        encoder_layers_per_block=(1,) * len(blocks),
        decoder_layers_per_block=(2,) * len(blocks),
        encoder_qkv_multiscales=((),) * len(blocks),
        decoder_qkv_multiscales=((),) * len(blocks),
        upsample_block_type="interpolate",
        scaling_factor=1.0,
    )


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, 64, 64, 3) to float (n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(vae: AutoencoderKL, images: np.ndarray, rng: torch.Generator, *, kl: float = 2e-4) -> torch.Tensor:
    """Twice the `_gap` of what the posterior's samples are decoded to, plus a small pull of the posterior to N(0, 1)."""
    x = pixels(images)
    with torch.autocast("cpu", torch.bfloat16):
        moments = vae.quant_conv(vae.encoder(x)).float()
        mean, logvar = moments.chunk(2, 1)
        logvar = logvar.clamp(-20, 10)
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=rng)
        y = vae.decode(z).sample.float()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return 2 * _gap(y, x) + kl * divergence


def imitation_loss(
    vae: AutoencoderDC, images: np.ndarray, mean: torch.Tensor, std: torch.Tensor, rng: torch.Generator
) -> torch.Tensor:
    """Of an encoder that should say `mean` (n, channels, h, w) for these images, and of a decoder of N(mean, std) to them."""
    x = pixels(images)
    with torch.autocast("cpu", torch.bfloat16):
        z = vae.encode(x).latent.float()
        y = vae.decode(mean + std * torch.randn(mean.shape, generator=rng)).sample.float()
    return 2 * _gap(y, x) + (z - mean).square().mean()


def _gap(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 that counts paint six times as much as background.

    Sprites cover an eighth of a picture: with a flat weight the decoder first learns backgrounds and loses small shapes, and
    colours whose luminance is near the background's (the first prototype's fault)."""
    chroma = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    weight = 1 + 5 * torch.nn.functional.max_pool2d((chroma > 0.3).float(), 3, 1, 1)
    return (weight * (y - x).abs()).mean() / weight.mean()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, batch: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and standard deviation (n, channels, h, w) of uint8 images, unscaled, float32."""
    parts = [vae.encode(pixels(images[i : i + batch])).latent_dist for i in range(0, len(images), batch)]
    return torch.cat([p.mean for p in parts]).contiguous(), torch.cat([p.std for p in parts]).contiguous()


@torch.no_grad()
def standardise(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Rewrites the two 1x1 convolutions around the latents so that these have mean 0 and deviation 1 a channel.

    A pipeline only knows one scaling factor for all channels; mean, std: (channels,) of the latents as they were."""
    channels = len(std)
    for start, shift in ((0, mean), (channels, 2 * std.log())):
        rows = slice(start, start + channels)
        scale = 1 / std if start == 0 else torch.ones(channels)
        vae.quant_conv.weight[rows] *= scale[:, None, None, None]
        vae.quant_conv.bias[rows] = (vae.quant_conv.bias[rows] - shift) * scale
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]
