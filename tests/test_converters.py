"""Diffusers' own readers of other layouts, at the widths that they know, take ours for what it is."""

import pytest
import torch
from diffusers import (
    Flux2Pipeline,
    FluxPipeline,
    Lumina2Pipeline,
)

from fewstep import loraformat
from fewstep.loraformat import A, B

WIDE = {  # blocks as wide as the released models', for readers that know one width
    "FluxTransformer2DModel": {
        "transformer_blocks.0.attn.to_q": (3072, 3072),
        "transformer_blocks.0.attn.to_k": (3072, 3072),
        "transformer_blocks.0.attn.to_v": (3072, 3072),
        "transformer_blocks.0.attn.add_q_proj": (3072, 3072),
        "transformer_blocks.0.attn.add_k_proj": (3072, 3072),
        "transformer_blocks.0.attn.add_v_proj": (3072, 3072),
        "transformer_blocks.0.attn.to_out.0": (3072, 3072),
        "transformer_blocks.0.attn.to_add_out": (3072, 3072),
        "transformer_blocks.0.ff.net.0.proj": (3072, 12288),
        "transformer_blocks.0.ff.net.2": (12288, 3072),
        "transformer_blocks.0.ff_context.net.0.proj": (3072, 12288),
        "transformer_blocks.0.ff_context.net.2": (12288, 3072),
        "single_transformer_blocks.0.attn.to_q": (3072, 3072),
        "single_transformer_blocks.0.attn.to_k": (3072, 3072),
        "single_transformer_blocks.0.attn.to_v": (3072, 3072),
        "single_transformer_blocks.0.proj_mlp": (3072, 12288),
        "single_transformer_blocks.0.proj_out": (15360, 3072),
        "proj_out": (3072, 64),
    },
    "Flux2Transformer2DModel": {
        "transformer_blocks.0.attn.to_q": (64, 64),
        "transformer_blocks.0.attn.to_k": (64, 64),
        "transformer_blocks.0.attn.to_v": (64, 64),
        "transformer_blocks.0.attn.add_q_proj": (64, 64),
        "transformer_blocks.0.attn.add_k_proj": (64, 64),
        "transformer_blocks.0.attn.add_v_proj": (64, 64),
        "transformer_blocks.0.attn.to_out.0": (64, 64),
        "transformer_blocks.0.attn.to_add_out": (64, 64),
        "transformer_blocks.0.ff.linear_in": (64, 384),
        "transformer_blocks.0.ff.linear_out": (192, 64),
        "transformer_blocks.0.ff_context.linear_in": (64, 384),
        "transformer_blocks.0.ff_context.linear_out": (192, 64),
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj": (64, 576),
        "single_transformer_blocks.0.attn.to_out": (256, 64),
    },
    "Lumina2Transformer2DModel": {
        f"{blocks}.0.{module}": shape
        for blocks in ("layers", "noise_refiner", "context_refiner")
        for module, shape in {
            "attn.to_q": (2304, 2304),
            "attn.to_k": (2304, 768),
            "attn.to_v": (2304, 768),
            "attn.to_out.0": (2304, 2304),
            "feed_forward.linear_1": (2304, 64),
            "feed_forward.linear_2": (64, 2304),
            "feed_forward.linear_3": (2304, 64),
            "norm1.linear": (64, 64),  # that reader wants one wherever there is one
        }.items()
        if (blocks, module) != ("context_refiner", "norm1.linear")
    },
}


def acted(state: dict[str, torch.Tensor], module: str, x: torch.Tensor) -> torch.Tensor:
    return state[module + B].flatten(1) @ (state[module + A].flatten(1) @ x)


@pytest.mark.parametrize(
    ("pipeline", "network", "layout"),
    [
        (FluxPipeline, "FluxTransformer2DModel", "kohya"),
        (Flux2Pipeline, "Flux2Transformer2DModel", "kohya"),
        (Flux2Pipeline, "Flux2Transformer2DModel", "comfyui"),
        (Lumina2Pipeline, "Lumina2Transformer2DModel", "comfyui"),
    ],
)
def test_diffusers_own_converter_agrees_at_the_released_widths(pipeline, network, layout):
    rng = torch.Generator().manual_seed(0)
    folded = {}
    for module, (wide, high) in WIDE[network].items():
        folded[module + A] = torch.randn(4, wide, generator=rng)
        folded[module + B] = torch.randn(high, 4, generator=rng)
    theirs = pipeline.lora_state_dict(loraformat.spell(folded, loraformat.naming(layout, network, "transformer")))
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    found = {k.removeprefix("transformer."): v for k, v in theirs.items()}
    assert found.keys() == folded.keys()
    for module, (wide, _) in WIDE[network].items():
        x = torch.randn(wide, generator=rng)
        torch.testing.assert_close(acted(found, module, x), acted(folded, module, x), rtol=1e-4, atol=1e-3)
