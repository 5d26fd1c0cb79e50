"""The smallest pipelines of the FLUX families."""

from typing import Any

from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tiny.parts import seeded, tiny_clip, tiny_clip_tokenizer, tiny_qwen_tokenizer, tiny_t5, tiny_t5_tokenizer, tiny_vae


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

    return seeded(make, seed)


# Of a text encoder whose layers 9, 18, 27 (or 10, 20, 30) are read.
_DEEP = dict(vocab_size=300, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4)


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

    return seeded(make, seed)


def tiny_klein_pipeline(seed: int = 0) -> Flux2KleinPipeline:
    """FLUX.2 klein, the base model: guided by two passes, three layers of a Qwen 3."""

    def make() -> Flux2KleinPipeline:
        text = Qwen3Config(**_DEEP, num_hidden_layers=27, max_position_embeddings=512)
        return Flux2KleinPipeline(
            text_encoder=Qwen3ForCausalLM(text),
            tokenizer=tiny_qwen_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>"),
            **tiny_flux2_parts(guidance=False),
        )

    return seeded(make, seed)
