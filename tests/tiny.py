"""Random pipelines of stock Diffusers classes, made offline in a fraction of a second: the smallest teachers of every family."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

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

    return _seeded(make, seed)


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

    return _seeded(make, seed)


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

    return _seeded(make, seed)


def tiny_flux_pipeline(seed: int = 0) -> FluxPipeline:
    """FLUX.1 dev: packed latents, embedded guidance, a time shift that depends on the size."""

    def make() -> FluxPipeline:
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 2, 2),
            guidance_embeds=True,
        )
        return FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=tiny_vae(shift_factor=0.1, scaling_factor=0.4),
            text_encoder=tiny_clip(),
            tokenizer=tiny_clip_tokenizer(),
            text_encoder_2=tiny_t5(),
            tokenizer_2=tiny_t5_tokenizer(),
        )

    return _seeded(make, seed)


def tiny_flux2_parts(guidance: bool) -> dict[str, Any]:
    """What both FLUX.2 pipelines have: blocks of latents standardised by a batch norm, a shift that knows size and steps."""
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance,
    )
    vae = AutoencoderKLFlux2(block_out_channels=(4, 4, 4, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler}


def tiny_qwen_tokenizer(template: str) -> Qwen2Tokenizer:
    vocab = {token: i for i, token in enumerate([*LETTERS, "<|endoftext|>", "<|im_end|>"])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], eos_token="<|im_end|>", model_max_length=512)
    tokenizer.chat_template = template
    return tokenizer


# Of a text encoder whose layers 9, 18, 27 (or 10, 20, 30) are read.
_DEEP = dict(vocab_size=300, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4)


def tiny_flux2_pipeline(seed: int = 0) -> Flux2Pipeline:
    """FLUX.2 dev: embedded guidance, three layers of a Mistral 3."""

    def make() -> Flux2Pipeline:
        text = dict(_DEEP, model_type="mistral", num_hidden_layers=30)
        vision = dict(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
        )
        config = Mistral3Config(text_config=text, vision_config=vision | {"model_type": "pixtral"}, image_token_index=299)
        return Flux2Pipeline(
            text_encoder=Mistral3ForConditionalGeneration(config),
            tokenizer=tiny_qwen_tokenizer("{% for m in messages %}{{ m['content'][0]['text'] }}<|im_end|>{% endfor %}"),
            **tiny_flux2_parts(guidance=True),
        )

    return _seeded(make, seed)


def tiny_klein_pipeline(seed: int = 0) -> Flux2KleinPipeline:
    """FLUX.2 klein, the base model: guided by two passes, three layers of a Qwen 3."""

    def make() -> Flux2KleinPipeline:
        text = Qwen3Config(**_DEEP, num_hidden_layers=27, max_position_embeddings=512)
        return Flux2KleinPipeline(
            text_encoder=Qwen3ForCausalLM(text),
            tokenizer=tiny_qwen_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>"),
            **tiny_flux2_parts(guidance=False),
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

    return _seeded(make, seed)


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

    return _seeded(make, seed)


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

    return _seeded(make, seed)


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

    return _seeded(make, seed)


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

    return _seeded(make, seed)


def tiny_wan22_pipeline(seed: int = 0) -> WanPipeline:
    """Wan 2.2 A14B: another network below the boundary, which lies in the middle of four deployed times."""
    one = tiny_wan_pipeline(seed)
    other = _seeded(lambda: WanPipeline(**{**one.components, "transformer_2": tiny_wan_transformer()}), seed + 1)
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

    return _seeded(make, seed)


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

    return _seeded(make, seed)


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


# name of a family -> (its smallest pipeline, the size in pixels to use it at; None: its own)
MAKERS: dict[str, tuple[Callable[[], DiffusionPipeline], tuple[int, ...] | None]] = {
    "sd": (tiny_sd_pipeline, None),
    "sd21": (tiny_sd21_pipeline, None),
    "sdxl": (tiny_sdxl_pipeline, None),
    "sd3": (tiny_sd3_pipeline, None),
    "flux": (tiny_flux_pipeline, (64, 48)),
    "flux2": (tiny_flux2_pipeline, (64, 48)),
    "klein": (tiny_klein_pipeline, (64, 48)),
    "pixart": (tiny_pixart_pipeline, None),
    "sana": (tiny_sana_pipeline, (64, 32)),
    "lumina2": (tiny_lumina2_pipeline, None),
    "qwen": (tiny_qwen_pipeline, (64, 48)),
    "wan": (tiny_wan_pipeline, (5, 64, 48)),
    "wan22": (tiny_wan22_pipeline, (5, 64, 48)),
    "ltx": (tiny_ltx_pipeline, (9, 32, 64)),
    "cogvideox": (tiny_cogvideox_pipeline, None),
    "zimage": (tiny_zimage_pipeline, None),
    "dit": (tiny_dit_pipeline, None),
    "ddpm": (tiny_ddpm_pipeline, None),
}


def save(pipe: DiffusionPipeline, folder: Path) -> Path:
    """Writes a pipeline as a Diffusers folder and returns it: `load_teacher(str(save(tiny_sd_pipeline(), tmp_path)))`."""
    pipe.save_pretrained(folder)
    return folder
