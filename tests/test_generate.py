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
from fewstep.networks import Full

SPEC = importlib.util.spec_from_file_location("generate", Path(__file__).parents[1] / "samplers" / "generate.py")
generate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    makers = {"sd": tiny_sd_pipeline, "pixart": tiny_pixart_pipeline}
    return {name: load_teacher(str(save(make(), root / name))) for name, make in makers.items()}


@pytest.mark.parametrize(
    ("name", "kind", "form", "layout"),
    [
        ("sd", LORA, "lora", "diffusers"),
        ("sd", LORA, "lora", "kohya"),
        ("sd", Full(("end_time",)), None, None),
        ("pixart", LORA, "lora", None),
        ("pixart", LORA, "full", None),
    ],
)
def test_it_draws_what_was_exported(teachers, name, kind, form, layout, tmp_path):
    teacher = teachers[name]
    made = {"sampler": "ddim", "steps": 2, "form": form, "layout": layout, "record": RECORD}
    out = export(teacher, kind, student(teacher, kind), to=tmp_path / "out", **made)
    pipe = generate.load(out, teacher.path if form == "lora" else None)
    pipe.set_progress_bar_config(disable=True)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    facts, reference = proof.read(out), proof.Reference(out)
    _, drawn = proof.draw(pipe, facts, reference, 2)
    torch.testing.assert_close(drawn, reference.tensors["images_2"], rtol=0, atol=proof.PIXELS)


def test_it_draws_no_more_steps_than_an_export_claims(teachers, tmp_path, monkeypatch):
    teacher, kind = teachers["sd"], Full(("end_time",))
    out = export(teacher, kind, student(teacher, kind), sampler="ddim", steps=1, to=tmp_path / "one", record=RECORD)
    monkeypatch.setattr("sys.argv", ["generate.py", str(out), "--prompt", "a circle", "--steps", "2"])
    with pytest.raises(SystemExit, match="draws in one step alone, not in 2; leave --steps away"):
        generate.main()


def test_it_runs_no_code_of_an_export(tmp_path, monkeypatch):
    """A pipeline of its own is the one beside this file, or none."""
    (tmp_path / "fewstep.json").write_text('{"runs_by": "told.py"}')
    (tmp_path / "told.py").write_text("raise AssertionError('never run')")
    monkeypatch.setattr(generate, "__file__", str(tmp_path / "elsewhere" / "generate.py"))
    with pytest.raises(SystemExit, match="is drawn by told.py, which lies in it: read it, and copy it beside generate.py"):
        generate.load(tmp_path, None)


def test_what_it_cannot_draw_is_a_sentence(teachers, tmp_path):
    teacher = teachers["pixart"]
    made = {"sampler": "ddim", "steps": 2, "record": RECORD}
    weights = student(teacher, LORA)
    with pytest.raises(SystemExit, match="name that pipeline's folder or hub id with --base"):
        generate.load(export(teacher, LORA, weights, to=tmp_path / "peft", **made), None)
    with pytest.raises(SystemExit, match="layout comfyui, which Diffusers does not read"):
        generate.load(export(teacher, LORA, weights, to=tmp_path / "comfyui", layout="comfyui", **made), teacher.path)
