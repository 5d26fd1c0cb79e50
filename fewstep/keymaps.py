"""What ComfyUI and kohya's tools call the layers of each network: facts read from their sources, as tables.

ComfyUI: `model_lora_keys_unet` in comfy/lora.py and the tables of comfy/utils.py, with the layer names of comfy/ldm. kohya: the
networks/lora_*.py of sd-scripts and musubi-tuner, which name the layers of their own models. Both were read in November 2026.
"""

from __future__ import annotations

# (the tool's layer, where its parts lie in Diffusers, their names there): "#" is a block's number. Of several parts the layer has
# the rows one below the other, in this order. No rows: its layers are those of Diffusers.
Row = tuple[str, str, str]
SAME: tuple[Row, ...] = ()


def _block(ours: str, theirs: str, *lines: str) -> tuple[Row, ...]:
    """Rows of one kind of block. A line: their layer in it, where in it our modules lie, our modules."""
    found = []
    for line in lines:
        layer, place, parts = line.split(maxsplit=2)
        found.append((f"{theirs}.{layer}", f"{ours}.{place}", parts))
    return tuple(found)


_SD3 = _block(
    "transformer_blocks.#",
    "joint_blocks.#",
    "x_block.attn.qkv       attn        to_q to_k to_v",
    "x_block.attn.proj      attn        to_out.0",
    "x_block.attn2.qkv      attn2       to_q to_k to_v",
    "x_block.attn2.proj     attn2       to_out.0",
    "x_block.mlp.fc1        ff          net.0.proj",
    "x_block.mlp.fc2        ff          net.2",
    "context_block.attn.qkv   attn      add_q_proj add_k_proj add_v_proj",
    "context_block.attn.proj  attn      to_add_out",
    "context_block.mlp.fc1  ff_context  net.0.proj",
    "context_block.mlp.fc2  ff_context  net.2",
)
_FLUX_ATTENTION = _block(
    "transformer_blocks.#",
    "double_blocks.#",
    "img_attn.qkv   attn  to_q to_k to_v",
    "img_attn.proj  attn  to_out.0",
    "txt_attn.qkv   attn  add_q_proj add_k_proj add_v_proj",
    "txt_attn.proj  attn  to_add_out",
)
_FLUX = (
    *_FLUX_ATTENTION,
    *_block(
        "transformer_blocks.#",
        "double_blocks.#",
        "img_mlp.0  ff          net.0.proj",
        "img_mlp.2  ff          net.2",
        "txt_mlp.0  ff_context  net.0.proj",
        "txt_mlp.2  ff_context  net.2",
    ),
    ("single_blocks.#.linear1", "single_transformer_blocks.#", "attn.to_q attn.to_k attn.to_v proj_mlp"),
    ("single_blocks.#.linear2", "single_transformer_blocks.#", "proj_out"),
    ("final_layer.linear", "", "proj_out"),
)
_FLUX2 = (
    *_FLUX_ATTENTION,
    *_block(
        "transformer_blocks.#",
        "double_blocks.#",
        "img_mlp.0  ff          linear_in",
        "img_mlp.2  ff          linear_out",
        "txt_mlp.0  ff_context  linear_in",
        "txt_mlp.2  ff_context  linear_out",
    ),
    ("single_blocks.#.linear1", "single_transformer_blocks.#.attn", "to_qkv_mlp_proj"),
    ("single_blocks.#.linear2", "single_transformer_blocks.#.attn", "to_out"),
    ("final_layer.linear", "", "proj_out"),
)
_PIXART = _block(
    "transformer_blocks.#",
    "blocks.#",
    "attn.qkv              attn1  to_q to_k to_v",
    "attn.proj             attn1  to_out.0",
    "cross_attn.q_linear   attn2  to_q",
    "cross_attn.kv_linear  attn2  to_k to_v",
    "cross_attn.proj       attn2  to_out.0",
    "mlp.fc1               ff     net.0.proj",
    "mlp.fc2               ff     net.2",
)
_LUMINA2 = (
    ("layers.#.adaLN_modulation.1", "layers.#", "norm1.linear"),
    ("noise_refiner.#.adaLN_modulation.1", "noise_refiner.#", "norm1.linear"),
    *(
        row
        for kind in ("layers", "noise_refiner", "context_refiner")
        for row in _block(
            f"{kind}.#",
            f"{kind}.#",
            "attention.qkv    attn          to_q to_k to_v",
            "attention.out    attn          to_out.0",
            "feed_forward.w1  feed_forward  linear_1",
            "feed_forward.w2  feed_forward  linear_2",
            "feed_forward.w3  feed_forward  linear_3",
        )
    ),
)
_WAN = _block(
    "blocks.#",
    "blocks.#",
    "self_attn.q   attn1  to_q",
    "self_attn.k   attn1  to_k",
    "self_attn.v   attn1  to_v",
    "self_attn.o   attn1  to_out.0",
    "cross_attn.q  attn2  to_q",
    "cross_attn.k  attn2  to_k",
    "cross_attn.v  attn2  to_v",
    "cross_attn.o  attn2  to_out.0",
    "ffn.0         ffn    net.0.proj",
    "ffn.2         ffn    net.2",
)
_COGVIDEOX = _block(
    "transformer_blocks.#",
    "blocks.#",
    "q         attn1  to_q",
    "k         attn1  to_k",
    "v         attn1  to_v",
    "attn_out  attn1  to_out.0",
    "ff_proj   ff     net.0.proj",
    "ff_out    ff     net.2",
)

UNETS = ("UNet2DConditionModel",)  # ComfyUI reads these under kohya's names
LAYERS: dict[tuple[str, str], tuple[Row, ...]] = {
    ("comfyui", "UNet2DConditionModel"): SAME,
    ("comfyui", "SD3Transformer2DModel"): _SD3,
    ("comfyui", "FluxTransformer2DModel"): _FLUX,
    ("comfyui", "Flux2Transformer2DModel"): _FLUX2,
    ("comfyui", "PixArtTransformer2DModel"): _PIXART,
    ("comfyui", "Lumina2Transformer2DModel"): _LUMINA2,
    ("comfyui", "QwenImageTransformer2DModel"): SAME,
    ("comfyui", "ZImageTransformer2DModel"): SAME,  # z_image_to_diffusers has them, as slices of its own layers
    ("comfyui", "WanTransformer3DModel"): _WAN,
    ("comfyui", "LTXVideoTransformer3DModel"): SAME,
    ("comfyui", "CogVideoXTransformer3DModel"): _COGVIDEOX,
    ("kohya", "UNet2DConditionModel"): SAME,
    ("kohya", "SD3Transformer2DModel"): _SD3,
    ("kohya", "FluxTransformer2DModel"): _FLUX,
    ("kohya", "Flux2Transformer2DModel"): _FLUX2,
    ("kohya", "Lumina2Transformer2DModel"): _LUMINA2,
    ("kohya", "QwenImageTransformer2DModel"): SAME,
    ("kohya", "ZImageTransformer2DModel"): SAME,
    ("kohya", "WanTransformer3DModel"): _WAN,
}
# Layouts that stock Diffusers reads too, whatever the network's width (its readers of FLUX.1 and Lumina 2 know one width each).
DIFFUSERS_READS = {
    ("comfyui", "UNet2DConditionModel"),
    ("comfyui", "Flux2Transformer2DModel"),
    ("comfyui", "QwenImageTransformer2DModel"),
    ("comfyui", "ZImageTransformer2DModel"),
    ("comfyui", "WanTransformer3DModel"),
    ("comfyui", "LTXVideoTransformer3DModel"),
    ("kohya", "UNet2DConditionModel"),
    ("kohya", "Flux2Transformer2DModel"),
    ("kohya", "QwenImageTransformer2DModel"),
    ("kohya", "ZImageTransformer2DModel"),
    ("kohya", "WanTransformer3DModel"),
}
