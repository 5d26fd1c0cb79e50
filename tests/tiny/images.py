"""The smallest of the other image transformers."""

from diffusers import (
    AutoencoderDC,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
)

from tiny.parts import LETTERS, seeded, tiny_gemma, tiny_qwen_tokenizer, tiny_t5, tiny_t5_tokenizer, tiny_vae


def tiny_zimage_pipeline(seed: int = 0) -> ZImagePipeline:
    """Flow-matching transformer on 8x8x4 latents of 64x64 pixels, Qwen3 text encoder over bytes, no shift."""

    def make() -> ZImagePipeline:
        tokenizer = tiny_qwen_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>", 128)
        text = Qwen3Config(
            vocab_size=len(tokenizer),
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

    return seeded(make, seed)


def tiny_pixart_pipeline(seed: int = 0) -> PixArtSigmaPipeline:
    """Epsilon with a learned variance, masked T5 embeddings."""

    def make() -> PixArtSigmaPipeline:
        transformer = PixArtTransformer2DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=16,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,
            norm_type="ada_norm_single",
        )
        return PixArtSigmaPipeline(
            tokenizer=tiny_t5_tokenizer(),
            text_encoder=tiny_t5(),
            vae=tiny_vae(scaling_factor=0.13),
            transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(beta_schedule="linear"),
        )

    return seeded(make, seed)


def tiny_sana_pipeline(seed: int = 0) -> SanaPipeline:
    """Linear attention on 8x8x4 latents of a deterministic autoencoder, an instruction before every prompt, flow shift 3."""

    def make() -> SanaPipeline:
        text, tokenizer = tiny_gemma()
        transformer = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
        )
        vae = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        )
        scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        return SanaPipeline(tokenizer=tokenizer, text_encoder=text, vae=vae, transformer=transformer, scheduler=scheduler)

    return seeded(make, seed)


def tiny_lumina2_pipeline(seed: int = 0) -> Lumina2Pipeline:
    """Clock that runs backwards, a system prompt, guidance that keeps norms."""

    def make() -> Lumina2Pipeline:
        text, tokenizer = tiny_gemma()
        transformer = Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=16,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 16, 16),
            cap_feat_dim=16,
        )
        return Lumina2Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=tiny_vae(shift_factor=0.1, scaling_factor=0.4),
            text_encoder=text,
            tokenizer=tokenizer,
        )

    return seeded(make, seed)


def tiny_qwen_pipeline(seed: int = 0) -> QwenImagePipeline:
    """Packed latents of a video autoencoder's single frame, a Qwen 2.5 VL text encoder over bytes, guidance that keeps norms."""
    vocab = {token: i for i, token in enumerate([*LETTERS, "<|endoftext|>", "<|im_end|>", "<|im_start|>"])}

    def make() -> QwenImagePipeline:
        text = dict(
            vocab_size=len(vocab),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        )
        vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
        transformer = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 2, 2),
        )
        vae = AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[-0.5, 0.0, 0.25, 0.5],
            latents_std=[1.0, 2.0, 3.0, 0.5],
        )
        return QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02
            ),
            vae=vae,
            text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
            tokenizer=Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=2048),
            transformer=transformer,
        )

    return seeded(make, seed)
