"""LoRA layouts: the names that ComfyUI, kohya's tools and PEFT publish, and the same delta weights whoever reads them."""

import copy
import re

import pytest
import torch
from diffusers import (
    Flux2Pipeline,
    LTXPipeline,
    QwenImagePipeline,
    StableDiffusionPipeline,
    WanPipeline,
    ZImagePipeline,
)
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from test_export import LORA, student
from tiny import MAKERS, Made

from fewstep import keymaps, lorafiles, loraformat, strength
from fewstep.loraformat import A, B

# What each tool's layers are called, block numbers as #. ComfyUI: comfy/utils.py (mmdit_to_diffusers, flux_to_diffusers,
# pixart_to_diffusers, z_image_to_diffusers) and, for layers of one name, comfy/ldm/{wan,lightricks,qwen_image,cogvideo,lumina};
# the prefixes from model_lora_keys_unet in comfy/lora.py. kohya: sd-scripts networks/lora_{sd3,flux,lumina}.py, musubi-tuner
# networks/lora_{wan,qwen_image,zimage,flux_2}.py. Written by hand from there, not made from fewstep/keymaps.py.
FLUX = {
    *(f"double_blocks.#.{side}_{layer}" for side in ("img", "txt") for layer in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")),
    "single_blocks.#.linear1",
    "single_blocks.#.linear2",
    "final_layer.linear",
}
SD3 = {
    f"joint_blocks.#.{side}_block.{layer}"
    for side in ("x", "context")
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
}
LUMINA2 = {
    f"{blocks}.#.{layer}"
    for blocks in ("layers", "noise_refiner", "context_refiner")
    for layer in ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
}
QWEN = {
    f"transformer_blocks.#.{layer}"
    for layer in (
        *(
            f"attn.{name}"
            for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        ),
        *(f"{side}_mlp.net.{name}" for side in ("img", "txt") for name in ("0.proj", "2")),
    )
}
ZIMAGE = {
    f"{blocks}.#.{layer}"
    for blocks in ("layers", "noise_refiner", "context_refiner")
    for layer in (
        *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
    )
}
WAN = {f"blocks.#.{kind}_attn.{name}" for kind in ("self", "cross") for name in "qkvo"} | {"blocks.#.ffn.0", "blocks.#.ffn.2"}
LTX = {
    f"transformer_blocks.#.{layer}"
    for layer in (
        *(f"attn{k}.{name}" for k in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.net.0.proj",
        "ff.net.2",
    )
}
PIXART = {
    f"blocks.#.{layer}"
    for layer in (
        *("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2"),
    )
}
COGVIDEOX = {f"blocks.#.{layer}" for layer in ("q", "k", "v", "attn_out", "ff_proj", "ff_out")}
PUBLISHED = {
    ("sd3", "comfyui"): SD3,
    ("sd3", "kohya"): SD3,
    ("flux", "comfyui"): FLUX,
    ("flux", "kohya"): FLUX,
    ("flux2", "comfyui"): FLUX - {"final_layer.linear"},
    ("flux2", "kohya"): FLUX - {"final_layer.linear"},
    ("pixart", "comfyui"): PIXART,
    ("lumina2", "comfyui"): LUMINA2,
    ("lumina2", "kohya"): LUMINA2,
    ("qwen", "comfyui"): QWEN,
    ("qwen", "kohya"): QWEN,
    ("zimage", "comfyui"): ZIMAGE,
    ("zimage", "kohya"): ZIMAGE,
    ("wan", "comfyui"): WAN,
    ("wan", "kohya"): WAN,
    ("wan22", "comfyui"): WAN,
    ("ltx", "comfyui"): LTX,
    ("cogvideox", "comfyui"): COGVIDEOX,
}
NONE = [
    ("sana", "comfyui"),
    ("sana", "kohya"),
    ("ltx", "kohya"),
    ("pixart", "kohya"),
    ("cogvideox", "kohya"),
    ("ddpm", "comfyui"),
]
UNET = [("sd", "comfyui"), ("sdxl", "kohya")]
ALL = [*PUBLISHED, *UNET, *((name, "peft") for name in MAKERS), *((name, "diffusers") for name in MAKERS)]


@pytest.fixture(scope="module")
def adapters(teachers):
    """The folded adapter of a family's student; of two networks, the first one's."""

    def make(name: str) -> dict[str, torch.Tensor]:
        return loraformat.apart(loraformat.fold(student(teachers[name], LORA), LORA.scale), teachers[name].components)[0]

    return Made(make)


def names_of(teacher, layout: str) -> loraformat.Naming:
    return loraformat.naming(layout, type(getattr(teacher.pipe, teacher.components[0])).__name__, teacher.family.component)


def stems(spelt: dict[str, torch.Tensor], names: loraformat.Naming) -> set[str]:
    return {k.removesuffix(names.a) for k in spelt if k.endswith(names.a)}


@pytest.mark.parametrize(("name", "layout"), PUBLISHED)
def test_names_are_those_that_the_tool_publishes(teachers, adapters, name, layout):
    names = names_of(teachers[name], layout)
    spelt = loraformat.spell(adapters[name], names)
    number = re.compile(r"(?<=[a-z]s[._])\d+(?=[._])|(?<=refiner[._])\d+(?=[._])")  # blocks.7., layers_7_, noise_refiner.7.
    found = {number.sub("#", stem) for stem in stems(spelt, names)}
    wanted = {
        f"diffusion_model.{k}" if layout == "comfyui" else f"lora_unet_{k.replace('.', '_')}" for k in PUBLISHED[name, layout]
    }
    assert found == wanted
    ends = (".lora_A.weight", ".lora_B.weight") if layout == "comfyui" else (".lora_down.weight", ".lora_up.weight", ".alpha")
    assert set(spelt) == {stem + end for stem in stems(spelt, names) for end in ends}


@pytest.mark.parametrize(("name", "layout"), UNET)
def test_unets_keep_kohyas_names_of_diffusers_layers(teachers, adapters, name, layout):
    spelt = loraformat.spell(adapters[name], names_of(teachers[name], layout))
    blocks = r"lora_unet_(down_blocks_\d|mid_block|up_blocks_\d)_"
    inner = r"attn[12]_to_[qkv]|attn[12]_to_out_0|ff_net_0_proj|ff_net_2"
    layers = (
        rf"attentions_\d_(proj_in|proj_out|transformer_blocks_\d_({inner}))|resnets_\d_(conv1|conv2|conv_shortcut|time_emb_proj)"
        r"|downsamplers_0_conv|upsamplers_0_conv"
    )
    ends = r"\.(lora_down\.weight|lora_up\.weight|alpha)"
    assert not [k for k in spelt if not re.fullmatch(f"{blocks}({layers}){ends}", k)]


@pytest.mark.parametrize(("name", "layout"), NONE)
def test_a_layout_that_nobody_published_is_refused_by_name(teachers, name, layout):
    with pytest.raises(ValueError, match=f"no '{layout}' names are known for the LoRA of a {type(teachers[name].net).__name__}"):
        names_of(teachers[name], layout)


@pytest.mark.parametrize(("name", "layout"), ALL)
def test_a_reader_blind_to_metadata_gets_the_same_deltas(teachers, adapters, name, layout, tmp_path):
    """ComfyUI's arithmetic: alpha / rank (1 without an alpha) times up @ down, on the rows of the layer that a module is."""
    names, folded = names_of(teachers[name], layout), adapters[name]
    spelt = loraformat.spell(folded, names)
    for key, alpha in spelt.items():
        if key.endswith(".alpha"):
            assert float(alpha) == len(spelt[key.removesuffix(".alpha") + names.a])
    save_file(spelt, tmp_path / "lora.safetensors")
    found = dict(strength.deltas(tmp_path / "lora.safetensors", lorafiles.facts([folded], names, ["lora.safetensors"], ["it"])))
    assert sorted(found) == loraformat.modules(folded)
    for module, added in found.items():
        torch.testing.assert_close(added, loraformat.delta(folded[module + A], folded[module + B]).flatten(1))
    covered = sum(len(spelt[stem + names.b]) for stem in stems(spelt, names))
    assert covered == sum(len(v) for k, v in folded.items() if k.endswith(B))  # every row of a fused layer is some module's


@pytest.mark.parametrize("name", ["sd3", "pixart", "ddpm"])
def test_peft_reads_its_folder(teachers, adapters, name, tmp_path):
    teacher, folded = teachers[name], adapters[name]
    lorafiles.write(teacher, folded, names_of(teacher, "peft"), tmp_path, lorafiles.PEFT_FILE)
    net = PeftModel.from_pretrained(copy.deepcopy(teacher.net), tmp_path).base_model.model
    layers = {n: m for n, m in net.named_modules() if isinstance(m, BaseTunerLayer)}
    assert sorted(layers) == loraformat.modules(folded)
    for module, layer in layers.items():
        torch.testing.assert_close(
            layer.get_delta_weight("default").detach(), loraformat.delta(folded[module + A], folded[module + B])
        )


PIPELINES = {
    "sd": StableDiffusionPipeline,
    "flux2": Flux2Pipeline,
    "qwen": QwenImagePipeline,
    "zimage": ZImagePipeline,
    "wan": WanPipeline,
    "ltx": LTXPipeline,
}


@pytest.mark.parametrize(
    ("name", "layout"), [(n, k) for n in PIPELINES for k in ("comfyui", "kohya") if (n, k) != ("ltx", "kohya")]
)
def test_diffusers_reads_what_we_say_it_reads(teachers, adapters, name, layout, tmp_path):
    teacher, folded = teachers[name], adapters[name]
    names = names_of(teacher, layout)
    assert names.reader == "diffusers"
    lorafiles.write(teacher, folded, names, tmp_path, "lora.safetensors")
    pipe = PIPELINES[name].from_pretrained(teacher.path)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    net = getattr(pipe, teacher.family.component)
    layers = {n: m for n, m in net.named_modules() if isinstance(m, BaseTunerLayer)}
    assert sorted(layers) == loraformat.modules(folded)
    for module, layer in layers.items():
        found = layer.get_delta_weight(layer.active_adapters[0]).detach()
        torch.testing.assert_close(found, loraformat.delta(folded[module + A], folded[module + B]))


def test_fused_layers_are_block_diagonal():
    """The rows of each part see their own A alone, as sd-scripts' split_qkv stores it, and alpha is the rank of all."""
    rng = torch.Generator().manual_seed(0)
    parts = {"to_q": 6, "to_k": 2, "to_v": 2}
    folded = {}
    for part, high in parts.items():
        folded[f"layers.3.attn.{part}{A}"] = torch.randn(2, 5, generator=rng)
        folded[f"layers.3.attn.{part}{B}"] = torch.randn(high, 2, generator=rng)
    spelt = loraformat.spell(folded, loraformat.naming("kohya", "Lumina2Transformer2DModel", "transformer"))
    stem = "lora_unet_layers_3_attention_qkv"
    assert set(spelt) == {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"}
    assert float(spelt[f"{stem}.alpha"]) == 6 == len(spelt[f"{stem}.lora_down.weight"])
    up = spelt[f"{stem}.lora_up.weight"]
    for rows, columns in ((slice(0, 6), slice(0, 2)), (slice(6, 8), slice(2, 4)), (slice(8, 10), slice(4, 6))):
        outside = up[rows].clone()
        outside[:, columns] = 0
        assert up[rows, columns].all() and not outside.any()


def test_a_part_of_a_fused_layer_is_refused():
    pair = {f"layers.3.attn.to_q{A}": torch.zeros(2, 5), f"layers.3.attn.to_q{B}": torch.zeros(6, 2)}
    with pytest.raises(ValueError, match="is 3 layers of this network in one, of which this LoRA has only layers.3.attn.to_q"):
        loraformat.spell(pair, loraformat.naming("kohya", "Lumina2Transformer2DModel", "transformer"))


def test_a_layer_without_a_name_is_refused():
    with pytest.raises(ValueError, match="has no name for norm_out.linear"):
        loraformat.naming("comfyui", "WanTransformer3DModel", "transformer").stems(["norm_out.linear"])


def test_two_layers_of_one_name_are_refused():
    names = loraformat.naming("kohya", "UNet2DConditionModel", "unet")
    with pytest.raises(ValueError, match="two layers would both be called lora_unet_a_b_c"):
        names.stems(["a.b_c", "a_b.c"])


def test_an_alpha_that_is_not_the_rank_is_found(adapters, teachers, tmp_path):
    names = names_of(teachers["sd3"], "kohya")
    spelt = loraformat.spell(adapters["sd3"], names)
    first = min(k for k in spelt if k.endswith(".alpha"))
    save_file(spelt | {first: spelt[first] / 2}, tmp_path / "x")
    with pytest.raises(strength.Broken, match="alpha must equal rank"):
        list(strength.deltas(tmp_path / "x", lorafiles.facts([adapters["sd3"]], names, ["x"], ["it"])))


def test_a_weight_of_no_layer_is_found(adapters, teachers, tmp_path):
    names = names_of(teachers["sd3"], "comfyui")
    facts, spelt = lorafiles.facts([adapters["sd3"]], names, ["x"], ["it"]), loraformat.spell(adapters["sd3"], names)
    save_file(spelt | {names.stem("nowhere") + names.a: torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(strength.Broken, match="ignored 1 weights of x .first: diffusion_model.nowhere"):
        list(strength.deltas(tmp_path / "x", facts))
    first = min(spelt)
    save_file({k: v for k, v in spelt.items() if k != first}, tmp_path / "x")
    with pytest.raises(strength.Broken, match=f"x has no {first}"):
        list(strength.deltas(tmp_path / "x", facts))


def test_the_tables_name_networks_that_diffusers_has():
    import diffusers

    assert all(hasattr(diffusers, network) for _, network in keymaps.LAYERS)
    assert keymaps.LAYERS.keys() >= keymaps.DIFFUSERS_READS
