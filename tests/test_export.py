"""Exports as files: key names, folded alpha, what is refused, and that a folder is written whole or not at all."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, safe_open, save_file
from tiny import save, tiny_ddpm_pipeline, tiny_sd_pipeline, tiny_zimage_pipeline

from fewstep import card, loraformat, swap
from fewstep.adapters import Teacher, load_teacher
from fewstep.export import FACTS, LORA_FILE, RESULTS, export
from fewstep.networks import Full, Lora, build

LORA = Lora(rank=4, alpha=12.0)  # scale 3: a reader that gets it wrong is far off
RECORD = {
    "config": {"objective": {"name": "dmd", "steps": 4}},
    "results": {
        "rows": [{"model": "student", "steps": 4, "fd": 1.23456}],
        "protocol": {"name": "mine", "hash": "ab12", "extractor": "zoo:sprites-clip", "reference": "photos", "n": 40},
    },
}


def student(teacher: Teacher, kind: Full | Lora) -> dict[str, torch.Tensor]:
    """A student as training leaves it: every weight has moved, so B is not zero."""
    role = build(copy.deepcopy(teacher.net), {"student": kind}, lora_targets=teacher.family.lora_targets)["student"]
    rng = torch.Generator().manual_seed(3)
    return {k: v.detach() + 0.05 * torch.randn(v.shape, generator=rng) for k, v in role.weights().items()}


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Teacher:
    folder = save(tiny_sd_pipeline(), tmp_path_factory.mktemp("teachers") / "sd")
    (folder / "README.md").write_text("---\nlicense: openrail\ntags: [x]\n---\nA card.\n")
    return load_teacher(str(folder))


@pytest.fixture(scope="module")
def zimage(tmp_path_factory) -> Teacher:
    return load_teacher(str(save(tiny_zimage_pipeline(), tmp_path_factory.mktemp("teachers") / "zimage")))


@pytest.fixture(scope="module")
def lora(sd, tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("exports") / "student"
    return export(sd, LORA, student(sd, LORA), sampler="renoise", steps=4, to=to, record=RECORD)


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def deltas(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What each adapted layer adds to its weight, by PEFT's own account."""
    layers = {n: m for n, m in net.named_modules() if isinstance(m, BaseTunerLayer)}
    return {n: m.get_delta_weight(m.active_adapters[0]).detach() for n, m in layers.items()}


@pytest.mark.parametrize("metadata", ["with its metadata", "without"])
def test_the_stock_reader_applies_the_strength_of_training(sd, lora, metadata, tmp_path):
    roles = build(copy.deepcopy(sd.net), {"default": LORA}, lora_targets=sd.family.lora_targets)
    weights = student(sd, LORA)
    for key, p in roles["default"].weights().items():
        p.data.copy_(weights[key])
    for module in roles["default"].net.modules():
        if isinstance(module, BaseTunerLayer):
            module._active_adapter = ["default"]
    wanted = deltas(roles["default"].net)

    folder = lora
    if metadata == "without":
        save_file(load_file(lora / LORA_FILE), tmp_path / LORA_FILE)
        folder = tmp_path
    pipe = StableDiffusionPipeline.from_pretrained(sd.path)
    pipe.load_lora_weights(folder)
    got = deltas(pipe.unet)
    assert got.keys() == wanted.keys()
    assert any(v.ndim == 4 for v in got.values())
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value)


def test_the_lora_says_in_its_header_that_alpha_is_rank(lora):
    with safe_open(lora / LORA_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.r"] == metadata["unet.lora_alpha"] == LORA.rank
    assert all(k.startswith("unet.") for k in load_file(lora / LORA_FILE))


def test_half_a_lora_is_refused():
    with pytest.raises(ValueError, match="one half of a LoRA"):
        loraformat.modules(["a.lora_A.weight"])


def test_what_is_recorded(sd, lora):
    facts = json.loads((lora / FACTS).read_text())
    assert facts["files"] == sorted(contents(lora))
    assert facts["times"] == {"1": [999.0], "2": [999.0, 499.0], "4": [999.0, 749.0, 499.0, 249.0]}
    assert facts["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 64, "width": 64}
    assert facts["record"] == RECORD and facts["form"] == "lora" and facts["teacher"]["path"] == sd.path


def test_where_files_lay_on_this_disk_is_nowhere_in_what_others_read(sd, tmp_path):
    """A full student needs no teacher beside it; data go by their names, what is no place stays."""
    parts = {"prompts": "/home/me/my words/prompts.txt", "images": "/home/me/shards/train-*.tar"}
    config = {"teacher": {"path": sd.path}, "data": parts, "stages": [{"data": parts}], "see": "https://host/a/b", "lr": 1.0}
    record = {"config": config, "results": {"rows": [], "protocol": {"extractor": "open_clip:ViT:/home/me/weights.safetensors"}}}
    out = export(sd, Full(), student(sd, Full()), sampler="renoise", steps=1, to=tmp_path / "out", record=record)
    told, written = (out / "README.md").read_text(), json.loads((out / FACTS).read_text())["record"]
    assert sd.path not in told and "distilled copy of `sd`" in told
    assert "/home/me" not in told + json.dumps(written)
    for kept in (written["config"], written["config"]["stages"][0]):
        assert kept["data"] == {"prompts": "prompts.txt", "images": "train-*.tar"}
    assert written["results"]["protocol"]["extractor"] == "open_clip:ViT:weights.safetensors"
    assert (written["config"]["see"], written["config"]["lr"]) == ("https://host/a/b", 1.0)


def test_the_card_states_what_is_known_and_invents_no_licence(sd, zimage, lora):
    made = ModelCard.load(lora / "README.md")
    data = made.data.to_dict()
    assert data["license"] == "openrail" and data["library_name"] == "diffusers" and "base_model" not in data
    assert {"lora", "few-step", "dmd"} <= set(data["tags"])
    assert "14.6146, 4.0" in made.text and "999, 749, 499, 249" in made.text and "| student | 4 | 1.235 |" in made.text
    protocol = "name `mine`, hash `ab12`, extractor `zoo:sprites-clip`, reference `photos`, n `40`"
    assert protocol in next(line for line in made.text.splitlines() if line.startswith("Protocol: "))
    facts = json.loads((lora / FACTS).read_text())
    front = card._front(replace(zimage, path="owner/model"), facts).to_dict()
    assert (front["base_model"], front["base_model_relation"]) == ("owner/model", "adapter")
    assert "license" not in front


@pytest.mark.parametrize(
    ("kind", "form", "layout", "says"),
    [
        (Full(), "lora", None, "form='full'"),
        (LORA, "full", "kohya", "form='lora'"),
        (LORA, "both", None, "'lora' or 'full'"),
        (LORA, "lora", "comfy", "diffusers, comfyui, kohya, peft"),
    ],
)
def test_a_form_that_cannot_be_is_refused_with_a_remedy(sd, kind, form, layout, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        export(sd, kind, {}, sampler="renoise", steps=4, to=tmp_path / "out", form=form, layout=layout, record={})
    assert not list(tmp_path.iterdir())


def test_a_family_without_lora_loader_is_told_what_it_can_have(tmp_path):
    teacher = load_teacher(str(save(tiny_ddpm_pipeline(), tmp_path / "ddpm")))
    with pytest.raises(ValueError, match="layout='peft', or with form='full'"):
        export(teacher, LORA, {}, sampler="ddim", steps=4, to=tmp_path / "out", form="lora", layout="diffusers", record={})


def test_weights_of_another_network_are_refused(sd, tmp_path):
    weights = {k.replace("down_blocks.0", "down_blocks.7"): v for k, v in student(sd, Full()).items()}
    with pytest.raises(ValueError, match="other weights"):
        export(sd, Full(), weights, sampler="renoise", steps=4, to=tmp_path / "out", record={})
    assert not list(tmp_path.iterdir())


def test_a_foreign_folder_is_left_alone(sd, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a fewstep export"):
        export(sd, LORA, student(sd, LORA), sampler="renoise", steps=4, to=tmp_path / "thesis", record={})
    assert contents(tmp_path) == {"thesis/thesis.tex": b"years of work"}


@pytest.mark.parametrize("foreign", ["thesis.tex", "scheduler/mine.json", "data/.hidden", "results.json.old"])
def test_what_lies_in_an_export_and_is_not_of_it_is_never_deleted(sd, lora, tmp_path, foreign):
    out = Path(shutil.copytree(lora, tmp_path / "out"))
    (out / foreign).parent.mkdir(exist_ok=True)
    (out / foreign).write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"holds {foreign} beside the export there; take that out, or choose another folder"):
        export(sd, LORA, student(sd, LORA), sampler="renoise", steps=4, to=out, record=RECORD)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damaged", ["{", "[]", "{}", '{"files": 3}', '{"files": [[]]}'])
def test_an_export_that_does_not_say_what_is_of_it_is_not_replaced(sd, lora, tmp_path, damaged):
    out = Path(shutil.copytree(lora, tmp_path / "out"))
    (out / FACTS).write_text(damaged)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="does not list the export's files.*remove that folder, or choose another one"):
        export(sd, LORA, student(sd, LORA), sampler="renoise", steps=4, to=out, record=RECORD)
    assert contents(tmp_path) == before


def test_what_was_measured_of_an_export_stays_while_it_draws_the_same(sd, tmp_path, recwarn):
    def export_it(kind: Full | Lora) -> None:
        export(sd, kind, student(sd, kind), sampler="renoise", steps=4, to=tmp_path / "out", record=RECORD)

    export_it(LORA)
    (tmp_path / "out" / RESULTS).write_text("{}")
    (tmp_path / "out" / "__pycache__").mkdir()  # as importing an export's own pipeline leaves it
    (tmp_path / "out" / "__pycache__" / "told.pyc").write_bytes(b"")
    export_it(LORA)
    assert (tmp_path / "out" / RESULTS).read_text() == "{}"
    assert RESULTS not in json.loads((tmp_path / "out" / FACTS).read_text())["files"]
    with pytest.warns(UserWarning, match="was measured of what lay there before and is dropped; `fewstep eval"):
        export_it(Lora(rank=4, alpha=6.0))
    assert not (tmp_path / "out" / RESULTS).exists()


def test_an_export_that_dies_leaves_nothing_or_the_one_before(sd, tmp_path, monkeypatch):
    def export_it() -> Path:
        return export(sd, LORA, student(sd, LORA), sampler="renoise", steps=4, to=tmp_path / "out", record=RECORD)

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(card, "write", die)
        export_it()
    assert not list(tmp_path.iterdir())

    before = contents(export_it())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(card, "write", die)
        export_it()
    assert contents(tmp_path) == {f"out/{k}": v for k, v in before.items()}

    after = contents(export_it())
    assert after.keys() == before.keys()  # replaced as a whole
    (tmp_path / "out").rename(tmp_path / ".out.old")  # as a kill between the two renames leaves it
    swap.restore(tmp_path / "out")
    assert contents(tmp_path) == {f"out/{k}": v for k, v in after.items()}


def test_a_base_that_training_changed_is_read_again(sd, tmp_path):
    teacher = load_teacher(sd.path)
    role = build(teacher.net, {"student": LORA}, lora_targets=teacher.family.lora_targets, dtype=torch.bfloat16)["student"]
    out = export(teacher, LORA, role.weights(), sampler="renoise", steps=4, to=tmp_path / "out", form="full", record={})
    saved = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == sd.net.state_dict().keys()
    for key, value in sd.net.state_dict().items():  # B of a fresh adapter is zero: the teacher itself
        assert torch.equal(saved[key], value)
