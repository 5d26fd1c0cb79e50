"""A student that is told the end of its jump leaves the house: Diffusers and one file tell it what the library tells it."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from isolated import proofs_of
from PIL import Image
from safetensors.torch import load_file, save_file
from test_export import RECORD, student
from tiny import MAKERS, save, tiny_sd_pipeline, tiny_zimage_pipeline

from fewstep import judging, proof, told
from fewstep.adapters import load_teacher
from fewstep.api import Run, train
from fewstep.config import parse
from fewstep.drawing import draw
from fewstep.embedders import END, GUIDANCE
from fewstep.evaluation.protocol import load_protocol
from fewstep.export import ENDS_FILE, export
from fewstep.exported import Exported
from fewstep.networks import Full
from fewstep.preview import Preview

# name: (teacher, what its network takes, trained steps)
EXPORTS = {
    "sd": ("sd", (END,), 4),
    "sd-guided": ("sd", (GUIDANCE, END), 2),
    "zimage": ("zimage", (END,), 2),
    "zimage-guided": ("zimage", (GUIDANCE, END), 4),
    "sd-one": ("sd", (END,), 1),
    "sd-guided-one": ("sd", (GUIDANCE, END), 1),
}
# objective: (teacher, trained steps), of a run of one round
RUNS = {"meanflow": ("sd", 2), "shortcut": ("zimage", 2), "boot": ("sd", 1)}
CLAIMED = {name: (1,) if name in ("sd-one", "sd-guided-one", "boot") else (1, 2, 4) for name in (*EXPORTS, *RUNS)}
TOLD = [name for name, counts in CLAIMED.items() if counts != (1,)]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Holds the teachers and the exports of students by name."""
    root = tmp_path_factory.mktemp("told")
    makers = {"sd": tiny_sd_pipeline, "zimage": tiny_zimage_pipeline}
    teachers = {name: load_teacher(str(save(make(), root / "teachers" / name))) for name, make in makers.items()}
    for name, (family, inputs, steps) in EXPORTS.items():
        teacher, kind = teachers[family], Full(inputs)
        made = {"record": RECORD, "guidance": 2.5}
        export(teacher, kind, student(teacher, kind), sampler="ddim", steps=steps, to=root / name, **made)
    return root


@pytest.fixture(scope="module")
def runs(root) -> dict[str, Run]:
    """Runs by their objective, exported beside the others."""
    (root / "prompts.txt").write_text("a circle\na square\n")
    found = {}
    for name, (family, steps) in RUNS.items():
        tree = {
            "teacher": {"path": str(root / "teachers" / family), "guidance": 2.0},
            "student": {"weights": "full"},
            "objective": {"name": name, "steps": steps},
            "data": {"prompts": str(root / "prompts.txt"), **({} if name == "boot" else {"pairs": 2, "pairs_steps": 1})},
            "train": {"rounds": 1, "batch": 2, "lr": 2e-2, "ema": 0.0, "warmup": 1, "device": "cpu"},
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Preview, "__call__", lambda *_: None)
            found[name] = train(parse(tree), root / "runs" / name)
        found[name].export(root / name)
    return found


@pytest.fixture(scope="module")
def proofs(root, runs, tmp_path_factory) -> dict[str, list[dict]]:
    """The findings of one process that cannot import fewstep."""
    return proofs_of(dict.fromkeys(CLAIMED, ""), root, tmp_path_factory.mktemp("scratch"))


@pytest.mark.parametrize("name", CLAIMED)
def test_diffusers_draws_what_the_library_draws(proofs, name):
    """Pixels within 1e-4 of fewstep's own rollout, the times seen are the trained grid, at every count that is claimed."""
    assert not [c for c in proofs[name] if not c["ok"]]
    found = {c["name"] for c in proofs[name]}
    assert {f for f in found if " at " in f} == {f"{what} at {n}" for what in ("times", "pixels") for n in CLAIMED[name]}
    assert ("pipeline" in found) == (name in TOLD) and "without fewstep" in found


@pytest.mark.parametrize("name", ["sd", "zimage-guided"])
def test_in_one_step_the_stock_pipeline_needs_no_telling_and_in_more_it_does(root, name):
    facts, reference = proof.read(root / name), proof.Reference(root / name)
    stock = proof.load(root / name, facts | {"runs_by": None}, "")
    gaps = {n: proof._gap(proof.draw(stock, facts, reference, n)[1], reference.tensors[f"images_{n}"]) for n in (1, 2, 4)}
    assert gaps[1] <= proof.PIXELS and gaps[2] > 10 * proof.PIXELS and gaps[4] > 10 * proof.PIXELS


def tell_another_clock(out: Path) -> None:
    facts = json.loads((out / "fewstep.json").read_text())
    facts["ends"]["clock"] = facts["ends"]["clock"][::-1]
    (out / "fewstep.json").write_text(json.dumps(facts))


def tell_otherwise(out: Path) -> None:
    weights = load_file(out / ENDS_FILE)
    save_file(weights | {"2.weight": 1.1 * weights["2.weight"]}, out / ENDS_FILE)


def change_code(out: Path) -> None:
    (out / "told.py").write_text("raise SystemExit('never run')\n")


@pytest.mark.parametrize(
    ("sabotage", "found"),
    [
        (tell_another_clock, {"pixels at 2", "pixels at 4"}),
        (tell_otherwise, {"pixels at 2", "pixels at 4"}),
        (change_code, {"pipeline"}),
        (lambda out: (out / ENDS_FILE).unlink(), {"files"}),
    ],
)
def test_a_wrong_end_is_found_out(root, sabotage, found, tmp_path):
    out = Path(shutil.copytree(root / "sd", tmp_path / "out"))
    sabotage(out)
    assert {c["name"] for c in proof.prove(out, "", tmp_path) if not c["ok"]} == found


@pytest.mark.parametrize("levels", ["diffusion", "flow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_end_is_the_next_time_in_every_precision_and_clean_after_the_last(levels, dtype):
    class Scheduler:
        timesteps = torch.tensor([999.0, 749.0, 499.0, 249.0]) + (levels == "flow")
        config = type("Config", (), {"num_train_timesteps": 1000})

    if levels == "diffusion":
        Scheduler.alphas_cumprod = None
    ends = [told.after(float(torch.tensor(t, dtype=dtype)), Scheduler) for t in (1.0, 0.75, 0.5, 0.25)]
    assert ends == [0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("name", ["sd", "sd-one"])
def test_the_lines_on_the_card_run_and_claim_no_more_than_is_proved(root, name, monkeypatch):
    text = (root / name / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) \|", text, re.M)
    assert rows == (["1", "2", "4"] if name == "sd" else ["1"])
    assert ("`told.py`, in this folder" in text) == ("import told" in text) == ("ComfyUI" not in text) == (name == "sd")
    assert ("in one step alone" in text) == (name == "sd-one")
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], {})
    assert (root / "image.png").stat().st_size > 0
    (root / "image.png").unlink()


def test_an_export_of_one_step_draws_in_no_more(root):
    one = Exported(root / "sd-one")
    assert one.counts == (1,) and one.sample(["a circle"]).shape == (1, 64, 64, 3)
    with pytest.raises(ValueError, match="draws in one step alone, not in 2; leave --steps away"):
        one.sample(["a circle"], 2)


def test_experts_that_are_told_an_end_cannot_be_exported(root, tmp_path):
    teacher = load_teacher(str(root / "teachers" / "sd"))
    with pytest.raises(ValueError, match="no pipeline tells several experts the end of their jump"):
        export(teacher, Full((END,)), {}, sampler="ddim", steps=2, phases=2, to=tmp_path / "no", record=RECORD)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", RUNS)
def test_the_export_of_a_run_draws_the_pictures_of_the_run(root, runs, name):
    """At the trained steps and others, with the noise that `fewstep sample` of the run takes."""
    exported, prompts = Exported(root / name), ["a circle", "a square"]
    assert exported.counts == CLAIMED[name]
    for n in exported.counts:
        gap = exported.sample(prompts, n, seed=3).astype(int) - runs[name].sample(prompts, n, seed=3)
        assert np.abs(gap).max() <= 1  # of 255: a pixel may lie where it is rounded


def test_sample_and_eval_take_an_export(root, tmp_path):
    draw(root / "sd", ["a circle", "a square"], None, [1, 2], False, 0, None, tmp_path / "out")
    shown = np.asarray(Image.open(tmp_path / "out" / "student-2" / "000001.png"))
    assert np.array_equal(shown, Exported(root / "sd").sample(["a circle", "a square"], 2)[1])
    with pytest.raises(ValueError, match="is an export, which has no teacher beside it"):
        draw(root / "sd", ["a circle"], None, [], True, 0, None, tmp_path / "other")
    rows, known, _ = judging._rows(root / "sd-one", load_protocol("sprites-quick"), [], True, None)
    assert [(row.model, row.steps) for row in rows] == [("student", 1)] and not known


def test_the_sampler_of_the_repository_is_the_file_that_exports_carry(root):
    here = Path(__file__).parents[1] / "samplers" / "told.py"
    assert here.read_bytes() == (root / "sd" / "told.py").read_bytes() == Path(told.__file__).read_bytes()


@pytest.mark.parametrize("name", ["wan", "cogvideox", "pixart"])
def test_other_families_are_told_alike(name, tmp_path):
    """Videos and their clocks too, wherever the network's time embedding is known."""
    teacher = load_teacher(str(save(MAKERS[name][0](), tmp_path / name)), size=MAKERS[name][1])
    kind = Full((END,))
    out = export(teacher, kind, student(teacher, kind), sampler="ddim", steps=2, to=tmp_path / "out", record=RECORD)
    checks = proof.prove(out, "", tmp_path)
    assert not [c for c in checks if not c["ok"]] and {c["name"] for c in checks} >= {"pixels at 2", "pixels at 4"}
