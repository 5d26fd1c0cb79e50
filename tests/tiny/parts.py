"""What the smallest pipelines are made of: text encoders, tokenizers, autoencoders, all random and made in memory."""

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LETTERS = sorted(ByteLevel.alphabet())


def seeded(make: Any, seed: int) -> Any:
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


def tiny_clip(kind: Any = CLIPTextModel, width: int = 16) -> Any:
    """A CLIP text encoder over bytes."""
    words = tiny_clip_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=16,
            projection_dim=width,
            num_hidden_layers=1 if kind is CLIPTextModel else 2,
            num_attention_heads=2,
            max_position_embeddings=128,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
        )
    )


def tiny_clip_tokenizer() -> CLIPTokenizer:
    vocab = {token: i for i, token in enumerate([*LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=128)


def tiny_t5_tokenizer() -> T5Tokenizer:
    letters = [(c, -3.0) for c in sorted({*string.ascii_letters, *string.digits, *".,:'"})]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=128)


def tiny_t5(width: int = 16) -> T5EncoderModel:
    config = T5Config(vocab_size=100, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    return T5EncoderModel(config)


def tiny_unet(**config: Any) -> UNet2DConditionModel:
    """Epsilon or v on 8x8x4 latents."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        **config,
    )


def sd_scheduler(**config: Any) -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **config,
    )


def tiny_qwen_tokenizer(template: str, length: int = 512) -> Qwen2Tokenizer:
    vocab = {token: i for i, token in enumerate([*LETTERS, "<|endoftext|>", "<|im_end|>"])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], eos_token="<|im_end|>", model_max_length=length)
    tokenizer.chat_template = template
    return tokenizer


def tiny_gemma() -> tuple[Gemma2Model, GemmaTokenizer]:
    letters = sorted({*string.printable, "\u2581"})
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *letters])}
    config = Gemma2Config(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
    )
    return Gemma2Model(config), GemmaTokenizer(vocab=vocab, merges=[])
