"""samplers/generate.py, what a deployer copies: it draws with every kind of export that Diffusers or PEFT reads."""

import importlib.util
from pathlib import Path

import pytest
import torch
from test_export import LORA, RECORD, student
from tiny import save, tiny_pixart_pipeline, tiny_sd_pipeline

from fewstep import proof
from fewstep.adapters import load_teacher
from fewstep.export import export

SPEC = importlib.util.spec_from_file_location("generate", Path(__file__).parents[1] / "samplers" / "generate.py")
generate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    makers = {"sd": tiny_sd_pipeline, "pixart": tiny_pixart_pipeline}
    return {name: load_teacher(str(save(make(), root / name))) for name, make in makers.items()}


@pytest.mark.parametrize(
    ("name", "form", "layout"),
    [("sd", "lora", "diffusers"), ("sd", "lora", "kohya"), ("pixart", "lora", None), ("pixart", "full", None)],
)
def test_it_draws_what_was_exported(teachers, name, form, layout, tmp_path):
    teacher = teachers[name]
    made = {"sampler": "ddim", "steps": 2, "form": form, "layout": layout, "record": RECORD}
    out = export(teacher, LORA, student(teacher, LORA), to=tmp_path / "out", **made)
    pipe = generate.load(out, teacher.path if form == "lora" else None)
    pipe.set_progress_bar_config(disable=True)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    facts, reference = proof._files(out), proof.Reference(out)
    _, drawn = proof.draw(pipe, facts, reference, 2)
    torch.testing.assert_close(drawn, reference.tensors["images_2"], rtol=0, atol=proof.PIXELS)


def test_what_it_cannot_draw_is_a_sentence(teachers, tmp_path):
    teacher = teachers["pixart"]
    made = {"sampler": "ddim", "steps": 2, "record": RECORD}
    weights = student(teacher, LORA)
    with pytest.raises(SystemExit, match="name that pipeline's folder or hub id with --base"):
        generate.load(export(teacher, LORA, weights, to=tmp_path / "peft", **made), None)
    with pytest.raises(SystemExit, match="layout comfyui, which Diffusers does not read"):
        generate.load(export(teacher, LORA, weights, to=tmp_path / "comfyui", layout="comfyui", **made), teacher.path)
