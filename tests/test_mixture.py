"""A student of several experts leaves the house: its export draws what the library draws, by Diffusers and one file alone."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from isolated import proofs_of
from safetensors.torch import load_file
from test_export import LORA, RECORD, student
from tiny import save, tiny_ddpm_pipeline, tiny_sd_pipeline, tiny_zimage_pipeline

from fewstep import mixture, phased, proof
from fewstep.adapters import load_teacher
from fewstep.experts import apart
from fewstep.export import export
from fewstep.networks import Full
from fewstep.verify import verify

TEACHERS = {"sd": tiny_sd_pipeline, "zimage": tiny_zimage_pipeline, "ddpm": tiny_ddpm_pipeline}
# name: (teacher, the experts' kind, sampler, trained steps, phases)
EXPORTS = {
    "sd-lora": ("sd", LORA, "renoise", 4, 2),
    "sd-full": ("sd", Full(), "ddim", 2, 2),
    "zimage-lora": ("zimage", LORA, "ddim", 4, 4),
    "zimage-full": ("zimage", Full(), "ddim", 4, 2),
    "ddpm-merged": ("ddpm", LORA, "ddim", 4, 2),
}


def mixed(teacher, kind, phases: int) -> dict[str, torch.Tensor]:
    """Weights of a student whose experts are far apart: expert k is k + 1 times as strong as the first."""
    one = student(teacher, kind)
    return {f"{k}.{name}": w * (1 + k / 2) for k in range(phases) for name, w in one.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Holds the teachers and their exports by name."""
    root = tmp_path_factory.mktemp("mixtures")
    teachers = {name: load_teacher(str(save(make(), root / name))) for name, make in TEACHERS.items()}
    for name, (family, kind, sampler, steps, phases) in EXPORTS.items():
        teacher, to = teachers[family], root / name
        weights = mixed(teacher, kind, phases)
        export(teacher, kind, weights, sampler=sampler, steps=steps, phases=phases, to=to, record=RECORD)
    return root


@pytest.fixture(scope="module")
def proofs(root, tmp_path_factory) -> dict[str, list[dict]]:
    """The findings of one process that cannot import fewstep."""
    return proofs_of({name: EXPORTS[name][0] for name in EXPORTS}, root, tmp_path_factory.mktemp("scratch"))


@pytest.mark.parametrize("name", EXPORTS)
def test_diffusers_draws_what_the_library_draws(proofs, name):
    """Pixels within 1e-4 of fewstep's own rollout, the times seen are the trained grid, at every count."""
    assert not [c for c in proofs[name] if not c["ok"]]
    counts = {1, 2, 4, EXPORTS[name][3]}
    wanted = {f"{what} at {n}" for what in ("times", "pixels") for n in counts} | {"pipeline", "without fewstep"}
    assert {c["name"] for c in proofs[name]} >= wanted | ({"LoRA on every layer at scale 1"} if name[-4:] == "lora" else set())


def test_every_expert_has_a_file_in_stock_names(root):
    """Each is a LoRA of its own, alpha folded in, that a stock pipeline reads alone."""
    teacher = load_teacher(str(root / "sd"))
    each = apart(mixed(teacher, LORA, 2), 2)
    for k, file in enumerate(mixture.lora_files(2, ["unet"]).values()):
        found = load_file(root / "sd-lora" / file)
        assert found.keys() == {f"unet.{name}" for name in each[k]}
        for name, w in each[k].items():
            assert torch.equal(found[f"unet.{name}"], w * (LORA.scale if "lora_B" in name else 1))
        teacher.pipe.load_lora_weights(root / "sd-lora", weight_name=file, adapter_name=f"alone_{k}")


def swap_files(out: Path) -> None:
    a, b = (out / file for file in mixture.lora_files(2, ["unet"]).values())
    a.rename(out / "other")
    b.rename(a)
    (out / "other").rename(b)


def move_switch(out: Path) -> None:
    facts = json.loads((out / "fewstep.json").read_text())
    facts["experts"]["switches"] = [800]
    (out / "fewstep.json").write_text(json.dumps(facts))


def change_code(out: Path) -> None:
    (out / "phased.py").write_text("raise SystemExit('never run')\n")


@pytest.mark.parametrize(
    ("sabotage", "found"), [(swap_files, {"pixels at 4"}), (move_switch, {"pixels at 4"}), (change_code, {"pipeline"})]
)
def test_a_sabotaged_mixture_is_found_out(root, sabotage, found, tmp_path):
    out = Path(shutil.copytree(root / "sd-lora", tmp_path / "out"))
    sabotage(out)
    failed = {c["name"] for c in proof.prove(out, str(root / "sd"), tmp_path) if not c["ok"]}
    assert found <= failed


@pytest.mark.parametrize(("clock", "switches"), [(999, (751, 249)), (-0.75, (0.25, 0.45))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_switch_belongs_to_the_expert_that_begins_there_in_every_precision(clock, switches, dtype):
    def forward(sample, timestep):
        raise AssertionError("only experts answer")

    experts = [lambda sample, timestep, k=k: k for k in range(3)]
    answer = phased.in_turn(forward, experts, switches, clock)
    start = 999.0 if clock > 0 else 0.0
    asked = [answer(torch.zeros(1, dtype=dtype), torch.tensor(t).to(dtype)) for t in (start, *switches, switches[-1] - clock / 5)]
    assert asked == [0, 1, 2, 2]


@pytest.mark.parametrize("name", ["sd-lora", "zimage-full"])
def test_the_lines_on_the_card_run(root, name, monkeypatch):
    lines = re.search(r"```python\n(.*?)```", (root / name / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(lines, {})
    assert (root / "image.png").stat().st_size > 0
    (root / "image.png").unlink()


def test_a_run_of_phased_dmd_exports_and_is_verified(root, tmp_path):
    from fewstep.api import train
    from fewstep.config import parse

    (tmp_path / "prompts.txt").write_text("a circle\na square\n")
    tree = {
        "teacher": {"path": str(root / "sd"), "guidance": 2.0},
        "student": {"rank": 2},
        "critic": {"rank": 2},
        "objective": {"name": "phased_dmd", "steps": 2, "critic_turns": 1, "phase_rounds": 1},
        "data": {"prompts": str(tmp_path / "prompts.txt")},
        "train": {"rounds": 2, "batch": 2, "lr": 1e-2, "ema": 0.0, "warmup": 1, "device": "cpu"},
    }
    out = train(parse(tree), tmp_path / "run").export(tmp_path / "out")
    report = verify(out)
    assert report.ok, str(report)


def test_the_sampler_of_the_repository_is_the_file_that_exports_carry(root):
    here = Path(__file__).parents[1] / "samplers" / "phased.py"
    assert here.read_bytes() == Path(phased.__file__).read_bytes() == (root / "sd-lora" / "phased.py").read_bytes()
