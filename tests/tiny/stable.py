"""The smallest Stable Diffusions, and the pipelines that are asked for a class or for nothing."""

from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from transformers import (
    CLIPTextModelWithProjection,
)

from tiny.parts import sd_scheduler, seeded, tiny_clip, tiny_clip_tokenizer, tiny_t5, tiny_t5_tokenizer, tiny_unet, tiny_vae


def tiny_sd_pipeline(seed: int = 0, **scheduler: Any) -> StableDiffusionPipeline:
    """Epsilon-predicting UNet on 8x8x4 latents of 64x64 pixels, CLIP text encoder over bytes, SD 1.5's scheduler."""

    def make() -> StableDiffusionPipeline:
        text, unet = tiny_clip(), tiny_unet(cross_attention_dim=16)
        return StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=text,
            tokenizer=tiny_clip_tokenizer(),
            unet=unet,
            scheduler=sd_scheduler(**scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    return seeded(make, seed)


def tiny_sd21_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """SD 2.1: the same under v-prediction."""
    return tiny_sd_pipeline(seed, prediction_type="v_prediction")


def tiny_sdxl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """Two CLIP text encoders, a pooled embedding and time ids."""

    def make() -> StableDiffusionXLPipeline:
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        return StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=tiny_clip(),
            text_encoder_2=tiny_clip(CLIPTextModelWithProjection, 8),
            tokenizer=tiny_clip_tokenizer(),
            tokenizer_2=tiny_clip_tokenizer(),
            unet=tiny_unet(cross_attention_dim=24, projection_class_embeddings_input_dim=32, **added),
            scheduler=sd_scheduler(),
            add_watermarker=False,
        )

    return seeded(make, seed)


def tiny_sd3_pipeline(seed: int = 0) -> StableDiffusion3Pipeline:
    """MMDiT on 8x8x4 latents, two CLIPs and a T5, time shift 3."""

    def make() -> StableDiffusion3Pipeline:
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
        )
        return StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(shift_factor=0.06, scaling_factor=1.5),
            text_encoder=tiny_clip(CLIPTextModelWithProjection, 8),
            tokenizer=tiny_clip_tokenizer(),
            text_encoder_2=tiny_clip(CLIPTextModelWithProjection, 8),
            tokenizer_2=tiny_clip_tokenizer(),
            text_encoder_3=tiny_t5(),
            tokenizer_3=tiny_t5_tokenizer(),
        )

    return seeded(make, seed)


def tiny_dit_pipeline(seed: int = 0) -> DiTPipeline:
    """Class-conditional: a thousand classes and "no class", epsilon with a learned variance, names of classes."""

    def make() -> DiTPipeline:
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
        )
        scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, set_alpha_to_one=True)
        pipe = DiTPipeline(transformer=transformer, vae=tiny_vae(), scheduler=scheduler)
        pipe.register_to_config(id2label={"207": "golden retriever, golden", "360": "otter"})  # as DiT's own index has it
        return pipe

    return seeded(make, seed)


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

    return seeded(make, seed)
