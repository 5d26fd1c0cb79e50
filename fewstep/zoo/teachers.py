"""The zoo's teachers, untrained: Stable Diffusion pipelines, and a flow-matching ZImagePipeline."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, Qwen3Config, Qwen3Model

from fewstep.denoiser import Cond, Denoiser
from fewstep.families import FAMILIES
from fewstep.schedules import NoiseSchedule
from fewstep.zoo.grammar import UNASKED, answers
from fewstep.zoo.words import clip_tokenizer, qwen_tokenizer

TEXT_WIDTH = 64
DROPOUT = 0.1  # share of captions replaced by "", so that guidance has something to push away from
WIDTHS = {8: (48, 80), 16: (48, 96)}  # of the UNet's two levels, by the side of the latents


def stable_diffusion(vae: AutoencoderKL, **noise: Any) -> StableDiffusionPipeline:
    """UNet of about 2 M parameters, with attention at 8x8 and below, and a two-layer CLIP text encoder.

    noise: what its scheduler has otherwise than Stable Diffusion 1's, which predicts epsilon."""
    tokenizer = clip_tokenizer()
    end = tokenizer.eos_token_id
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    side = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    outer = "CrossAttn" if side <= 8 else ""
    unet = UNet2DConditionModel(
        sample_size=side,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=WIDTHS[side],
        layers_per_block=1,
        down_block_types=(f"{outer}DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", f"{outer}UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    usual = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(
        **usual | noise,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,  # unused with trailing spacing; the pipeline rewrites any other value with a warning
    )
    return StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


def z_image(vae: AutoencoderKL) -> ZImagePipeline:
    """Flow-matching single-stream transformer (about 1.2 M parameters) and a small Qwen3 text encoder."""
    tokenizer = qwen_tokenizer()
    text = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=3,  # the pipeline reads the output of the last but one
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=TEXT_WIDTH // 4,
            max_position_embeddings=512,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    transformer = ZImageTransformer2DModel(
        in_channels=vae.config.latent_channels,
        dim=96,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 8, 8],
        axes_lens=[128, 32, 32],
    )
    # The tokenizer's pad positions are never seen; images come after the caption on the first axis.
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=1.0), vae, text, tokenizer, transformer)


class StableDiffusion(nn.Module):
    """What is trained of `stable_diffusion`: the text encoder (to read, `fewstep.zoo.grammar`), then the UNet."""

    def __init__(self, pipe: StableDiffusionPipeline, captions: list[str]) -> None:
        super().__init__()
        self.net, self.text = pipe.unet, pipe.text_encoder
        family = FAMILIES["StableDiffusionPipeline"]
        self.denoiser = Denoiser(self.net, family.schedule(pipe.scheduler), pipe.scheduler.config.prediction_type, family.call)
        tokens = pipe.tokenizer(["", *captions], padding="max_length", truncation=True, return_tensors="pt")
        self.tokens = tokens.input_ids
        self.asked = asked(pipe.tokenizer, captions, self.tokens)

    def hidden(self, rows: Tensor) -> Tensor:
        """The text encoder's states (B, L, width) of the captions with these numbers; 0 is the empty one."""
        return self.text(self.tokens[rows])[0]

    def cond(self, rows: Tensor) -> Cond:
        """Conditions of the captions with these numbers."""
        return Cond({"prompt": self.hidden(rows)})

    def loss(self, x0: Tensor, rows: Tensor, rng: torch.Generator) -> Tensor:
        """Regression of v, or of noise with the weight of `weight`: clean times would dominate a short training, and noisy ones,
        where places and relations are decided, would hardly count."""
        t = torch.rand(len(x0), generator=rng, dtype=torch.float64).clamp_min(1e-3)
        eps = torch.randn(x0.shape, generator=rng)
        prediction = self.denoiser(self.denoiser.schedule.add_noise(x0, eps, t), t, self.cond(rows))
        if self.denoiser.target == "v_prediction":
            return F.mse_loss(prediction.v, self.denoiser.aim(x0, eps, t))
        return ((prediction.eps - eps).square().flatten(1).mean(1) * weight(self.denoiser.schedule, t)).mean()


def weight(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """clamp(SNR, 1, 5) / SNR, at most 8: the square of x0's error counts once at noisy times (truncated SNR, Salimans and Ho
    2022, section 4) and at most five times at clean ones (min-SNR, Hang et al. 2023)."""
    alpha, sigma = schedule.alpha_sigma(t)
    snr = (alpha / sigma) ** 2
    return (snr.clamp(1, 5) / snr).clamp(max=8).float()


def asked(tokenizer: Any, captions: list[str], tokens: Tensor) -> Tensor:
    """What a reader of each caption (and of the empty one, first) should know at each token: int8 (N + 1, L, questions)."""
    words = [w.removesuffix("</w>").lstrip("Ġ\u2581") for w in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    rows = zip(["", *captions], tokens.tolist(), strict=True)
    return torch.tensor([answers(text, [words[i] for i in row]) for text, row in rows], dtype=torch.int8)


class ZImage(nn.Module):
    """What is trained of `z_image`: the text encoder (to read, `fewstep.zoo.grammar`), then the transformer."""

    def __init__(self, pipe: ZImagePipeline, captions: list[str]) -> None:
        super().__init__()
        self.net, self.text = pipe.transformer, pipe.text_encoder
        family = FAMILIES["ZImagePipeline"]
        self.denoiser = Denoiser(self.net, family.schedule(pipe.scheduler), "flow", family.call)
        chats = [pipe.tokenizer.apply_chat_template([{"role": "user", "content": c}], tokenize=False) for c in ("", *captions)]
        tokens = pipe.tokenizer(chats, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
        self.tokens, self.mask = tokens.input_ids, tokens.attention_mask
        self.asked = asked(pipe.tokenizer, captions, self.tokens).where(self.mask[..., None] > 0, UNASKED)

    def hidden(self, rows: Tensor) -> Tensor:
        """The text encoder's states (B, L, width) of the captions with these numbers, as the pipeline takes them; 0 is empty."""
        return self.text(self.tokens[rows], attention_mask=self.mask[rows], output_hidden_states=True).hidden_states[-2]

    def cond(self, rows: Tensor) -> Cond:
        """Conditions of the captions with these numbers."""
        return Cond({"prompt": self.hidden(rows), "length": self.mask[rows].sum(1)})

    def loss(self, x0: Tensor, rows: Tensor, rng: torch.Generator) -> Tensor:
        """Velocity regression at uniform times (Lipman et al. 2022): logit-normal ones leave the noisy end, where places and
        relations are decided, too little."""
        t = torch.rand(len(x0), generator=rng, dtype=torch.float64).clamp_min(1e-4)
        eps = torch.randn(x0.shape, generator=rng)
        prediction = self.denoiser(self.denoiser.schedule.add_noise(x0, eps, t), t, self.cond(rows))
        return F.mse_loss(prediction.velocity, eps - x0)
