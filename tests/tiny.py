"""Random pipelines of stock Diffusers classes, made offline in a fraction of a second: the smallest teachers of every family."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, Qwen2Tokenizer, Qwen3Config, Qwen3Model

LETTERS = sorted(ByteLevel.alphabet())


def _seeded(make: Any, seed: int) -> Any:
    """What `make()` makes from a seed of its own; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = make()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def tiny_vae(**config: Any) -> AutoencoderKL:
    """64x64 pixels to 8x8x4 latents."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=64,
        **config,
    )


def tiny_sd_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """Epsilon-predicting UNet on 8x8x4 latents of 64x64 pixels, CLIP text encoder over bytes, SD 1.5's scheduler."""
    vocab = {token: i for i, token in enumerate([*LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"])}

    def make() -> StableDiffusionPipeline:
        text = CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            bos_token_id=vocab["<|startoftext|>"],
            eos_token_id=vocab["<|endoftext|>"],
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
        )
        scheduler = DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        return StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(text),
            tokenizer=CLIPTokenizer(vocab=vocab, merges=[], model_max_length=128),
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    return _seeded(make, seed)


def tiny_zimage_pipeline(seed: int = 0) -> ZImagePipeline:
    """Flow-matching transformer on 8x8x4 latents of 64x64 pixels, Qwen3 text encoder over bytes, no shift."""
    vocab = {token: i for i, token in enumerate([*LETTERS, "<|endoftext|>", "<|im_end|>"])}

    def make() -> ZImagePipeline:
        tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], eos_token="<|im_end|>", model_max_length=128)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>"
        text = Qwen3Config(
            vocab_size=len(vocab),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=512,
        )
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 2, 2],
            axes_lens=[640, 16, 16],
        )
        return ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=tiny_vae(shift_factor=0.0, scaling_factor=0.3611),
            text_encoder=Qwen3Model(text),
            tokenizer=tokenizer,
            transformer=transformer,
        )

    return _seeded(make, seed)


def tiny_ddpm_pipeline(seed: int = 0) -> DDPMPipeline:
    """Unconditional epsilon-predicting UNet on 8x8 RGB pixels."""

    def make() -> DDPMPipeline:
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
        )
        return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())

    return _seeded(make, seed)


def save(pipe: DiffusionPipeline, folder: Path) -> Path:
    """Writes a pipeline as a Diffusers folder and returns it: `load_teacher(str(save(tiny_sd_pipeline(), tmp_path)))`."""
    pipe.save_pretrained(folder)
    return folder
