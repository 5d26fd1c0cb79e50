"""What the zoo's teachers teach leaves the house: a run of one round, exported and proved without fewstep."""

import pytest
from isolated import proofs_of

from fewstep import api
from fewstep.config import parse
from fewstep.preview import Preview
from fewstep.zoo import folder

# name: (teacher, weights); a LoRA on sprites-sd is what `fewstep demo` makes
RUNS = {"flow-lora": ("sprites-flow", "lora"), "flow-full": ("sprites-flow", "full"), "sd-full": ("sprites-sd", "full")}


@pytest.fixture(scope="module")
def proofs(tmp_path_factory):
    """The findings on the export of each run."""
    root = tmp_path_factory.mktemp("zoo")
    (root / "prompts.txt").write_text("a small red circle on a grey background\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(root / "cache"))
        patch.setattr(Preview, "__call__", lambda *_: None)
        for name, (teacher, weights) in RUNS.items():
            tree = {
                "teacher": {"path": f"zoo:{teacher}"},
                "student": {"weights": weights},
                "critic": {"weights": weights},
                "objective": {"name": "dmd", "steps": 2, "critic_turns": 1},
                "data": {"prompts": str(root / "prompts.txt")},
                "train": {"rounds": 1, "batch": 1, "lr": 1e-3, "warmup": 1, "ema": 0.0, "device": "cpu"},
            }
            api.train(parse(tree), root / "runs" / name).export(root / name)
    bases = {name: str(folder(teacher)) if weights == "lora" else "" for name, (teacher, weights) in RUNS.items()}
    return proofs_of(bases, root, tmp_path_factory.mktemp("scratch"))


@pytest.mark.parametrize("name", RUNS)
def test_a_student_of_the_zoo_is_proved(proofs, name):
    assert not [c for c in proofs[name] if not c["ok"]]
    assert {f"{what} at {n}" for what in ("times", "pixels") for n in (1, 2, 4)} <= {c["name"] for c in proofs[name]}
