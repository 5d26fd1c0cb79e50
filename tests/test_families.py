"""Every family's student, exported, is drawn by its stock pipeline as by fewstep; what a family cannot do is refused."""

import copy
import json

import pytest
import torch
from test_adapters import ours, seen, stock
from test_export import LORA, RECORD, student
from tiny import MAKERS

from fewstep import proof
from fewstep.adapters import load_teacher
from fewstep.export import export
from fewstep.families import FAMILIES, family_of
from fewstep.families.attention import instruction
from fewstep.families.padding import masked, unpadded
from fewstep.networks import Lora, build, gather

NEW = [name for name in MAKERS if name not in ("sd", "zimage", "ddpm")]  # tests/test_verify.py has those, in more ways
# renoise is not their first sampler: tokens, tokens of another order than the call's latents, sigmas told, a video, own latents
NOISED = ("flux", "flux2", "sana", "ltx", "dit")


@pytest.mark.parametrize(("name", "sampler"), [*((name, None) for name in NEW), *((name, "renoise") for name in NOISED)])
def test_an_exported_student_is_what_was_trained(teachers, name, sampler, tmp_path):
    """sampler: None is the family's first; the others put noise back, in the pipeline's own layout, from torch's generator."""
    teacher = teachers[name]
    sampler = sampler or next(iter(teacher.family.samplers))
    to = export(teacher, LORA, student(teacher, LORA), sampler=sampler, steps=4, to=tmp_path / "out", record=RECORD)
    checks = {c["name"]: c for c in proof.prove(to, teacher.path, tmp_path)}
    assert not [c for c in checks.values() if not c["ok"]]
    wanted = {f"{what} at {n}" for what in ("times", "pixels") for n in (1, 2, 4)} | {"same seed, same picture"}
    wanted |= {"LoRA on every layer at scale 1", "same picture without the LoRA's metadata"}
    assert checks.keys() >= wanted


@pytest.mark.parametrize(
    ("name", "layout"), [("flux", "comfyui"), ("pixart", "comfyui"), ("sd3", "kohya"), ("wan", "peft"), ("dit", "peft")]
)
def test_a_lora_under_other_names_is_what_was_trained(teachers, name, layout, tmp_path):
    """Fused layers, which Diffusers does not read, are merged by their matrices alone; PEFT reads its own folder."""
    teacher = teachers[name]
    sampler, weights = next(iter(teacher.family.samplers)), student(teacher, LORA)
    to = export(teacher, LORA, weights, sampler=sampler, steps=2, to=tmp_path / "out", layout=layout, record=RECORD)
    checks = {c["name"]: c for c in proof.prove(to, teacher.path, tmp_path)}
    assert not [c for c in checks.values() if not c["ok"]]
    assert checks.keys() >= {"LoRA on every layer at scale 1", "times at 2", "pixels at 1", "pixels at 2", "pixels at 4"}
    card = (to / "README.md").read_text()
    assert "load_lora_weights" not in card and "alpha equals its rank" in card
    assert ("PeftModel" if layout == "peft" else "Diffusers does not read its names") in card
    assert ("`models/loras`" in card) == (layout == "comfyui") and ("sd-scripts" in card) == (layout == "kohya")


@pytest.mark.parametrize(("name", "scale"), [("flux", 3.5), ("flux2", 4.0)])
def test_embedded_guidance_is_fed_and_not_mixed(teachers, name, scale):
    weak = teachers[name]
    strong = load_teacher(weak.path, size=MAKERS[name][1], guidance=9.0)
    assert (weak.setting.guidance, strong.setting.guidance) == (scale, 9.0) and strong.guidance == 1.0
    assert strong.call(1.0)["guidance_scale"] == 9.0
    noise = torch.randn(2, *weak.latent_shape)
    ends = []
    for teacher in (weak, strong):
        theirs, _ = stock(teacher, noise, 2)
        found, _ = ours(teacher, noise, teacher.grid(2, "ddim"), guidance=teacher.guidance)
        torch.testing.assert_close(seen(teacher, found[-1], theirs[-1]), theirs[-1], rtol=1e-5, atol=1e-5)
        ends.append(found[-1])
    assert float((ends[0] - ends[1]).abs().max()) > 1e-4


def test_a_shift_that_depends_on_the_size_is_that_of_the_teachers_size(teachers):
    small = teachers["flux"]
    large = load_teacher(small.path, size=(1024, 1024))
    assert small.grid(4, "ddim")[1] < large.grid(4, "ddim")[1]  # more tokens, more noise
    assert large.latent_shape == (4, 128, 128)


def test_the_null_of_sdxl_is_zeros_where_its_pipeline_says_so(teachers):
    teacher = teachers["sdxl"]
    null, empty = teacher.null().tensors, teacher.encode([""]).tensors
    assert not null["prompt"].any() and not null["pooled"].any() and empty["prompt"].any()
    assert teacher.resized(teacher.null()).tensors["size"].tolist() == [[64, 64, 0, 0, 64, 64]] == empty["size"].tolist()


def test_the_refiner_is_refused_by_name():
    with pytest.raises(ValueError, match="is the SDXL refiner .* distil the base model, StableDiffusionXLPipeline"):
        family_of("StableDiffusionXLImg2ImgPipeline")


def test_an_unknown_family_is_told_how_to_become_known():
    with pytest.raises(ValueError, match=r"KandinskyPipeline is not a family .*in fewstep/families/ and .*CONTRIBUTING.md"):
        family_of("KandinskyPipeline")


def test_a_size_of_the_wrong_kind_is_refused(teachers):
    with pytest.raises(ValueError, match=r"teacher.size is \[height, width\] for this teacher"):
        load_teacher(teachers["sdxl"].path, size=(9, 64, 64))
    with pytest.raises(ValueError, match="too small for this teacher"):
        load_teacher(teachers["sdxl"].path, size=(4, 64))


def test_every_family_of_the_table_has_a_tiny_teacher():
    made = {type(teacher()).__name__ for teacher, _ in MAKERS.values()}
    assert {
        family for family in FAMILIES if family != "DDIMPipeline"
    } == made  # DDIM's differs from DDPM's in its scheduler alone


def test_guidance_keeps_the_norms_that_its_pipeline_keeps(teachers):
    for name, rows in (("qwen", teachers["qwen"].family.pack), ("lumina2", torch.clone)):
        teacher = teachers[name]
        x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([0.9, 0.4], dtype=torch.float64)
        cond, guided = teacher.encode(["a", "b"]), teacher.guided(teacher.net, 50.0)  # strong: random nets hardly listen
        with torch.no_grad():
            c, u = guided.both(x, t, cond)
            found = guided(x, t, cond).velocity
        norm = lambda velocity: rows(velocity).norm(dim=-1)  # noqa: B023, E731
        torch.testing.assert_close(norm(found), norm(c.velocity), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(norm(torch.lerp(u.velocity, c.velocity, 50.0)), norm(c.velocity), rtol=1e-3)


@pytest.mark.parametrize("name", MAKERS)
def test_an_adapter_reaches_more_than_attention(teachers, name):
    adapted = {key.rpartition(".lora")[0] for key in student(teachers[name], LORA)}
    assert {"att" in layer for layer in adapted} == {True, False}, sorted(adapted)


def test_a_part_of_a_pipeline_of_two_networks_is_refused_in_a_sentence(teachers):
    pipe = teachers["wan"].pipe
    assert FAMILIES["WanPipeline"].refuse(pipe) is FAMILIES["WanPipeline"].refuse(teachers["wan22"].pipe) is None
    for parts in ({"boundary_ratio": 0.875}, {"transformer_2": pipe.transformer}):
        part = type(pipe)(**{**pipe.components, **parts})
        assert "whose two networks share the times at its boundary_ratio" in FAMILIES["WanPipeline"].refuse(part)
    tokens = type(pipe)(**pipe.components, expand_timesteps=True)
    assert "a time for every token" in FAMILIES["WanPipeline"].refuse(tokens)


def test_the_student_of_two_networks_is_two_networks(teachers, tmp_path):
    teacher = teachers["wan22"]
    assert teacher.components == ("transformer", "transformer_2") and teacher.net is teacher.net
    roles = build(copy.deepcopy(teacher.net), {"student": Lora(2)}, lora_targets=teacher.family.lora_targets)
    names = {key.split(".")[0] for key in roles["student"].weights()}
    assert names == {"transformer", "transformer_2"}
    with pytest.raises(ValueError, match="two networks along time, and so is its student as it is; leave student.phases away"):
        gather(roles, 2, teacher.family.call)
    to = export(teacher, LORA, student(teacher, LORA), sampler="ddim", steps=4, to=tmp_path / "out", record=RECORD)
    facts, card = json.loads((to / "fewstep.json").read_text()), (to / "README.md").read_text()
    assert facts["lora"]["others"]["transformer_2"]["file"] == "transformer_2_lora_weights.safetensors"
    with pytest.raises(ValueError, match="a PEFT folder holds one network's LoRA and WanPipeline has two"):
        weights = student(teacher, LORA)
        export(teacher, LORA, weights, sampler="ddim", steps=4, to=tmp_path / "no", record=RECORD, layout="peft")
    assert "load_lora_weights(folder, weight_name='transformer_2_lora_weights.safetensors', load_into_transformer_2=True)" in card
    (to / "transformer_2_lora_weights.safetensors").write_bytes((to / "pytorch_lora_weights.safetensors").read_bytes())
    wrong = [c["name"] for c in proof.prove(to, teacher.path, tmp_path) if not c["ok"]]
    assert wrong == ["pixels at 2", "pixels at 4"]  # one step is the first network's alone


def test_videos_are_shown_by_their_middle_frame_and_learned_from_prompts_alone(teachers):
    teacher = teachers["wan"]
    assert teacher.latent_shape == (4, 2, 8, 6)
    x = torch.randn(2, *teacher.latent_shape)
    assert teacher.decode(x).shape == (2, 5, 3, 64, 48) and teacher.to_images(x).shape == (2, 64, 48, 3)
    with pytest.raises(ValueError, match="WanPipeline makes videos, a picture is none; use data.prompts"):
        teacher.to_latents(teacher.to_images(x))


def test_the_instruction_and_the_system_prompt_are_not_part_of_the_null(teachers):
    for name in ("sana", "lumina2"):
        null, empty = teachers[name].null().tensors, teachers[name].encode([""]).tensors
        assert null["length"] < empty["length"] or not torch.allclose(null["prompt"], empty["prompt"])


@pytest.mark.parametrize("name", ["pixart", "sana", "lumina2", "ltx"])
def test_padding_that_no_prompt_of_a_batch_needs_is_left_out_and_missed_by_nobody(teachers, name):
    teacher, given = teachers[name], []
    cond = teacher.encode(["a", "a red cat"])
    words, longest = cond.tensors["prompt"], int(cond.tensors["length"].max())
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([0.9, 0.4], dtype=torch.float64)
    hook = teacher.net.register_forward_pre_hook(lambda net, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        teacher.denoiser(teacher.net)(x, t, cond)
        hook.remove()
        (args, kwargs), mask = given[0], given[0][1]["encoder_attention_mask"]
        assert kwargs["encoder_hidden_states"].shape[1] == mask.shape[1] == longest < words.shape[1]
        padded = {"encoder_hidden_states": words, "encoder_attention_mask": torch.zeros(words.shape[:2]).to(mask)}
        padded["encoder_attention_mask"][:, :longest] = mask
        torch.testing.assert_close(teacher.net(*args, **kwargs)[0], teacher.net(*args, **kwargs | padded)[0])


def test_sana_reads_no_more_than_the_longest_prompt_of_a_batch_and_says_the_same(teachers):
    teacher, prompts, read = teachers["sana"], ["A cat ", "a red cat", "cat " * 200], []
    whole, mask = teacher.pipe.encode_prompt(prompts, False, complex_human_instruction=instruction(type(teacher.pipe)))[:2]
    hook = teacher.pipe.text_encoder.register_forward_pre_hook(lambda net, args: read.append(args[0].shape[1]))
    found, short = teacher.encode(prompts).tensors, teacher.encode(prompts[:2]).tensors
    hook.remove()
    assert read[0] - read[1] == 300 - 2 - len("a red cat")  # a token a letter, one at the sentence's beginning
    assert found["prompt"].shape == whole.shape and short["prompt"].shape == whole[:2].shape
    for i, n in enumerate(mask.sum(1).tolist()):
        assert n == found["length"][i]
        torch.testing.assert_close(found["prompt"][i, :n], whole[i, :n])
        if i < 2:
            torch.testing.assert_close(short["prompt"][i, :n], whole[i, :n])


def test_all_padding_is_left_where_a_prompt_has_no_token_of_its_own():
    words, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    found, seen = unpadded(masked(words, mask))
    assert torch.equal(found, words) and torch.equal(seen, mask.float())
    assert unpadded(masked(words[:1], mask[:1]))[0].shape == (1, 2, 3)
