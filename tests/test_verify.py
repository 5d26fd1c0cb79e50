"""Every kind of export is proved in a fresh process without fewstep, and every way of breaking one is found."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from isolated import proofs_of
from safetensors.torch import load_file, safe_open, save_file
from test_export import LORA, RECORD, student
from tiny import save, tiny_ddpm_pipeline, tiny_sd_pipeline, tiny_zimage_pipeline

from fewstep import proof
from fewstep.adapters import load_teacher
from fewstep.export import LORA_FILE, export
from fewstep.exported import Exported
from fewstep.networks import Full
from fewstep.push import pack
from fewstep.verify import verify

deprecated = pytest.mark.filterwarnings("error:.*torch_dtype.*")
TEACHERS = {"sd": tiny_sd_pipeline, "zimage": tiny_zimage_pipeline, "ddpm": tiny_ddpm_pipeline}
# name: (teacher, the student's kind, sampler, trained steps, form, layout)
EXPORTS = {
    "sd-lora": ("sd", LORA, "renoise", 3, "lora", None),
    "sd-peft": ("sd", LORA, "ddim", 4, "lora", "peft"),
    "sd-kohya": ("sd", LORA, "ddim", 4, "lora", "kohya"),
    "sd-merged": ("sd", LORA, "ddim", 4, "full", None),
    "sd-full": ("sd", Full(), "renoise", 1, None, None),
    "sd-guided": ("sd", Full(("guidance_scale",)), "renoise", 4, None, None),
    "zimage-guided": ("zimage", Full(("guidance_scale",)), "ddim", 4, None, None),
    "zimage-lora": ("zimage", LORA, "ddim", 4, None, None),
    "zimage-kohya": ("zimage", LORA, "ddim", 4, "lora", "kohya"),
    "zimage-noised": ("zimage", Full(), "renoise", 4, None, None),
    "zimage-full": ("zimage", Full(), "ddim", 2, None, None),
    "zimage-comfyui": ("zimage", LORA, "ddim", 4, "lora", "comfyui"),
    "ddpm-merged": ("ddpm", LORA, "ddim", 4, "full", None),
    "ddpm-peft-lora": ("ddpm", LORA, "ddim", 4, None, None),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Holds the teachers and their exports by name."""
    root = tmp_path_factory.mktemp("verify")
    teachers = {name: load_teacher(str(save(make(), root / name))) for name, make in TEACHERS.items()}
    for name, (family, kind, sampler, steps, form, layout) in EXPORTS.items():
        teacher, made = teachers[family], {"form": form, "layout": layout, "record": RECORD, "guidance": 2.5}
        export(teacher, kind, student(teacher, kind), sampler=sampler, steps=steps, to=root / name, **made)
    return root


@pytest.fixture(scope="module")
def proofs(root, tmp_path_factory) -> dict[str, list[dict]]:
    """The findings on every export but the first, by one fresh process: it starts in seconds, a proof takes less than one."""
    return proofs_of({name: EXPORTS[name][0] for name in list(EXPORTS)[1:]}, root, tmp_path_factory.mktemp("scratch"))


def wanted(name: str) -> set[str]:
    """The checks that an export must have passed."""
    steps, form = EXPORTS[name][3], EXPORTS[name][4]
    lora = {"LoRA on every layer at scale 1", "same picture without the LoRA's metadata"}
    common = {f"{what} at {n}" for what in ("times", "pixels") for n in {1, 2, 4, steps}}
    return (
        common | {"no pickles", "same seed, same picture", "without fewstep"} | (lora if "lora" in (form, name[-4:]) else set())
    )


def test_verify_passes_a_good_export_wherever_the_teacher_lies(root, tmp_path):
    moved = Path(shutil.copytree(root / "sd", tmp_path / "elsewhere"))
    shutil.copytree(root / "sd-lora", tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "fewstep.json").read_text())
    facts["teacher"]["path"] = str(tmp_path / "gone")
    (tmp_path / "out" / "fewstep.json").write_text(json.dumps(facts))
    with pytest.raises(
        ValueError, match="there is no teacher at .*gone.*put it back there, or give `fewstep verify` .* with --teacher"
    ):
        verify(tmp_path / "out")
    report = verify(tmp_path / "out", str(moved))
    assert report.ok, str(report)
    assert {c.name for c in report.checks} >= wanted("sd-lora")


@pytest.mark.parametrize("name", list(EXPORTS)[1:])
def test_every_kind_of_export_is_proved(proofs, name):
    assert not [c for c in proofs[name] if not c["ok"]]
    assert {c["name"] for c in proofs[name]} >= wanted(name)


@pytest.mark.parametrize("name", ["sd-lora", "sd-peft", "zimage-full", "ddpm-merged", "ddpm-peft-lora"])
@deprecated
def test_the_lines_on_the_card_run(root, name, monkeypatch):
    lines = re.search(r"```python\n(.*?)```", (root / name / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(root)
    (root / "image.png").unlink(missing_ok=True)
    exec(lines, {})
    assert (root / "image.png").stat().st_size > 0


def rewrite(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_scheduler(out: Path) -> None:
    rewrite(out / "scheduler" / "scheduler_config.json", original_inference_steps=50)


def change_clipping(out: Path) -> None:  # the times stay: only the pixels tell
    rewrite(out / "scheduler" / "scheduler_config.json", clip_sample=True)


def scale_weight(out: Path) -> None:
    """Half of one LoRA layer, or of one layer of the network, a quarter stronger."""
    file = next(
        f for f in (out / LORA_FILE, *out.glob("unet/*.safetensors"), *out.glob("transformer/*.safetensors")) if f.exists()
    )
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    key = max(k for k in tensors if "to_v" in k and "lora_A" not in k)
    tensors[key][::2] *= 1.25  # every other row: a norm behind the layer would undo one factor for all
    save_file(tensors, file, metadata=metadata)


def stretch_alpha(out: Path) -> None:
    """What other exporters write: the scale in the header alone."""
    with safe_open(out / LORA_FILE, "pt") as opened:
        metadata = opened.metadata()
    inner = json.loads(metadata["lora_adapter_metadata"])
    inner["unet.lora_alpha"] *= 4
    save_file(load_file(out / LORA_FILE), out / LORA_FILE, metadata={**metadata, "lora_adapter_metadata": json.dumps(inner)})


def rename_layer(out: Path) -> None:
    tensors = load_file(out / LORA_FILE)
    first = min(tensors).split(".lora_")[0]
    save_file({k.replace(first, "unet.nowhere") if k.startswith(first) else k: v for k, v in tensors.items()}, out / LORA_FILE)


def add_pickle(out: Path) -> None:
    torch.save({}, out / "optimizer.bin")


@pytest.mark.parametrize(
    ("name", "sabotage", "found"),
    [
        ("sd-lora", change_scheduler, {"times at 4", "pixels at 4"}),
        ("sd-lora", change_clipping, {"pixels at 4"}),
        ("sd-lora", scale_weight, {"pixels at 1", "pixels at 4"}),
        ("zimage-full", scale_weight, {"pixels at 1", "pixels at 4"}),
        ("sd-lora", stretch_alpha, {"LoRA on every layer at scale 1", "same picture without the LoRA's metadata", "pixels at 1"}),
        ("sd-lora", rename_layer, {"LoRA on every layer at scale 1"}),
        ("ddpm-merged", add_pickle, {"no pickles"}),
    ],
)
@deprecated  # the proof itself, which a warning would end early
def test_a_sabotaged_export_is_found_out(root, name, sabotage, found, tmp_path):
    out = Path(shutil.copytree(root / name, tmp_path / "out"))
    sabotage(out)
    failed = {c["name"]: c["detail"] for c in proof.prove(out, str(root / EXPORTS[name][0]), tmp_path) if not c["ok"]}
    assert found <= failed.keys()
    assert all(text and "\n" not in text and "Traceback" not in text for text in failed.values())


def test_a_lora_on_another_teacher_is_found_out(root, tmp_path):
    other = Path(shutil.copytree(root / "sd", tmp_path / "other"))
    rewrite(other / "model_index.json", _diffusers_version="0.0.1")
    checks = proof.prove(root / "sd-lora", str(other), tmp_path)
    assert [c["name"] for c in checks if not c["ok"]] == ["teacher"]


def truncate(out: Path) -> None:
    data = (out / LORA_FILE).read_bytes()
    (out / LORA_FILE).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("sabotage", "says"),
    [
        (truncate, f"{LORA_FILE} is damaged"),
        (lambda out: (out / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config.json is missing"),
        (lambda out: (out / "fewstep.json").write_text("{"), "fewstep.json is damaged"),
    ],
)
def test_verify_says_in_a_sentence_what_is_broken(root, sabotage, says, tmp_path):
    out = Path(shutil.copytree(root / "sd-lora", tmp_path / "out"))
    sabotage(out)
    report = verify(out)
    assert not report.ok
    assert says in str(report) and "Traceback" not in str(report)


def without(*names: str):
    """Takes a key out of fewstep.json."""

    def take(out: Path) -> None:
        facts = json.loads((out / "fewstep.json").read_text())
        *above, last = names
        del (facts[above[0]] if above else facts)[last]
        (out / "fewstep.json").write_text(json.dumps(facts))

    return take


@pytest.mark.parametrize(
    ("sabotage", "says"),
    [
        (lambda out: (out / "fewstep.json").write_text("[]"), "it holds no object"),
        (lambda out: (out / "fewstep.json").write_text('{"format": 3}'), "does not say teacher"),
        (lambda out: rewrite(out / "fewstep.json", times=[1]), "does not say times"),
        (without("lora"), "does not say lora"),
        (without("runs_by"), "does not say runs_by"),
        (without("teacher", "path"), "does not say teacher.path"),
    ],
)
def test_a_damaged_record_is_a_sentence_for_all_who_read_it(root, sabotage, says, tmp_path):
    out = Path(shutil.copytree(root / "sd-lora", tmp_path / "out"))
    sabotage(out)
    failed = [c["detail"] for c in proof.prove(out, str(root / "sd"), tmp_path) if not c["ok"]]
    assert len(failed) == 1 and failed[0].startswith("fewstep.json is damaged") and says in failed[0]
    for read in (Exported, lambda folder: pack(folder, "me/four")):
        with pytest.raises(ValueError, match=f"fewstep.json is damaged .*{says}.*; export again"):
            read(out)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_not_the_trained_ones(root, steps):
    with pytest.raises(ValueError, match=f"nothing can be drawn in {steps} steps; give at least 1"):
        Exported(root / "sd-full").sample(["a star"], steps=steps)


def test_a_folder_that_is_no_export_is_refused(root):
    with pytest.raises(ValueError, match="not a fewstep export"):
        verify(root / "sd")


def test_fewstep_cannot_be_imported_where_exports_are_proved():
    with pytest.raises(ImportError):
        proof.Blocker.find_spec("fewstep.losses")
    assert proof.Blocker.find_spec("torch") is None
