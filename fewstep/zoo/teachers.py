"""The zoo's two teachers, untrained: a StableDiffusionPipeline and a flow-matching ZImagePipeline on the same latents."""

from __future__ import annotations

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
from fewstep.zoo.words import clip_tokenizer, qwen_tokenizer

TEXT_WIDTH = 64
DROPOUT = 0.1  # share of captions replaced by "", so that guidance has something to push away from


def sprites_sd(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """Epsilon-predicting UNet with cross-attention (about 1.8 M parameters) and a two-layer CLIP text encoder."""
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
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 80),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,  # unused with trailing spacing; the pipeline rewrites any other value with a warning
    )
    return StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


def sprites_flow(vae: AutoencoderKL) -> ZImagePipeline:
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
        in_channels=4,
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


class SpritesSD(nn.Module):
    """What is trained of `sprites_sd`: UNet and text encoder, jointly."""

    def __init__(self, pipe: StableDiffusionPipeline, captions: list[str]) -> None:
        super().__init__()
        self.net, self.text = pipe.unet, pipe.text_encoder
        family = FAMILIES["StableDiffusionPipeline"]
        self.denoiser = Denoiser(self.net, family.schedule(pipe.scheduler), "epsilon", family.call)
        tokens = pipe.tokenizer(["", *captions], padding="max_length", truncation=True, return_tensors="pt")
        self.tokens = tokens.input_ids

    def cond(self, rows: Tensor) -> Cond:
        """Conditions of the captions with these numbers; 0 is the empty one."""
        return Cond({"prompt": self.text(self.tokens[rows])[0]})

    def loss(self, x0: Tensor, rows: Tensor, rng: torch.Generator) -> Tensor:
        """Noise regression weighted by min(SNR, 5) / SNR (Hang et al. 2023): clean times would dominate a short training."""
        t = torch.rand(len(x0), generator=rng, dtype=torch.float64).clamp_min(1e-3)
        eps = torch.randn(x0.shape, generator=rng)
        prediction = self.denoiser(self.denoiser.schedule.add_noise(x0, eps, t), t, self.cond(rows))
        return ((prediction.eps - eps).square().flatten(1).mean(1) * min_snr(self.denoiser.schedule, t)).mean()


def min_snr(schedule: NoiseSchedule, t: Tensor, most: float = 5.0) -> Tensor:
    alpha, sigma = schedule.alpha_sigma(t)
    return (most * (sigma / alpha) ** 2).clamp(max=1).float()


class SpritesFlow(nn.Module):
    """What is trained of `sprites_flow`: transformer and text encoder, jointly."""

    def __init__(self, pipe: ZImagePipeline, captions: list[str]) -> None:
        super().__init__()
        self.net, self.text = pipe.transformer, pipe.text_encoder
        family = FAMILIES["ZImagePipeline"]
        self.denoiser = Denoiser(self.net, family.schedule(pipe.scheduler), "flow", family.call)
        chats = [pipe.tokenizer.apply_chat_template([{"role": "user", "content": c}], tokenize=False) for c in ("", *captions)]
        tokens = pipe.tokenizer(chats, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
        self.tokens, self.mask = tokens.input_ids, tokens.attention_mask

    def cond(self, rows: Tensor) -> Cond:
        """Conditions of the captions with these numbers; 0 is the empty one."""
        mask = self.mask[rows]
        hidden = self.text(self.tokens[rows], attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        return Cond({"prompt": hidden, "length": mask.sum(1)})

    def loss(self, x0: Tensor, rows: Tensor, rng: torch.Generator) -> Tensor:
        """Velocity regression at logit-normal times (Esser et al. 2024, section 3.1)."""
        t = torch.randn(len(x0), generator=rng, dtype=torch.float64).sigmoid().clamp(1e-4, 1)
        eps = torch.randn(x0.shape, generator=rng)
        prediction = self.denoiser(self.denoiser.schedule.add_noise(x0, eps, t), t, self.cond(rows))
        return F.mse_loss(prediction.velocity, eps - x0)


TEACHERS = {"sprites-sd": (sprites_sd, SpritesSD), "sprites-flow": (sprites_flow, SpritesFlow)}
