"""The smallest video pipelines."""

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    UMT5Config,
    UMT5EncoderModel,
)

from tiny.parts import seeded, tiny_t5, tiny_t5_tokenizer


def tiny_wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )


def tiny_wan_pipeline(seed: int = 0) -> WanPipeline:
    """Videos: 4x8x8 compression, UMT5, flow shift 5 of a multistep solver."""

    def make() -> WanPipeline:
        transformer = tiny_wan_transformer()
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[-0.5, 0.0, 0.25, 0.5],
            latents_std=[1.0, 2.0, 3.0, 0.5],
        )
        text = UMT5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
        return WanPipeline(
            tokenizer=tiny_t5_tokenizer(),
            text_encoder=UMT5EncoderModel(text),
            vae=vae,
            scheduler=scheduler,
            transformer=transformer,
        )

    return seeded(make, seed)


def tiny_wan22_pipeline(seed: int = 0) -> WanPipeline:
    """Wan 2.2 A14B: another network below the boundary, which lies in the middle of four deployed times."""
    one = tiny_wan_pipeline(seed)
    other = seeded(lambda: WanPipeline(**{**one.components, "transformer_2": tiny_wan_transformer()}), seed + 1)
    other.register_to_config(boundary_ratio=0.875)
    return other


def tiny_ltx_pipeline(seed: int = 0) -> LTXPipeline:
    """Videos as tokens, masked T5, a time shift that depends on the length, with a terminal shift."""

    def make() -> LTXPipeline:
        transformer = LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=16,
        )
        vae = AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            decoder_block_out_channels=(4, 4, 4, 4),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=2,
        )
        return LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, shift_terminal=0.1),
            vae=vae,
            text_encoder=tiny_t5(),
            tokenizer=tiny_t5_tokenizer(),
            transformer=transformer,
        )

    return seeded(make, seed)


def tiny_cogvideox_pipeline(seed: int = 0) -> CogVideoXPipeline:
    """Videos under v-prediction with zero SNR at the noisy end, rotary embeddings."""

    def make() -> CogVideoXPipeline:
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=4,
            text_embed_dim=16,
            num_layers=1,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            use_rotary_positional_embeddings=True,
        )
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        )
        scheduler = CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
        )
        return CogVideoXPipeline(
            tokenizer=tiny_t5_tokenizer(),
            text_encoder=tiny_t5(),
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )

    return seeded(make, seed)
