"""Methods that are several stages, from the first to a proved export."""

from pathlib import Path

import pytest
import yaml

from fewstep import api
from fewstep.config import parse
from fewstep.verify import verify

CONFIGS = Path(__file__).parents[2] / "configs"
# The recipes that ship, but for the one whose smaller network is the zoo teacher's (test_slim.py has its road).
STAGED = sorted(f for f in CONFIGS.glob("sprites-sd-*.yaml") if "\nstages:" in f.read_text() and "slimflow" not in f.name)


def shrunk(tree, teacher, images):
    """A config of two rounds a stage on a tiny teacher."""
    few = {"rounds": 2, "batch": 2, "preview_every": 1000, "device": "cpu"}
    data = {**tree["data"], "pairs": 4, "pairs_steps": 2} if "pairs" in tree["data"] else {"images": images}
    for stage in tree["stages"]:
        stage["train"] = {**stage.get("train", {}), "rounds": 2}
        stage["objective"] |= {"critic_turns": 1} if stage["objective"].get("name") == "dmd" else {}
    return parse({**tree, "teacher": {**tree["teacher"], "path": teacher}, "data": data, "train": {**tree["train"], **few}})


@pytest.mark.parametrize("file", STAGED, ids=lambda file: file.stem)
def test_a_shipped_recipe_of_several_stages_goes_its_whole_road(file, teacher, images, tmp_path):
    config = shrunk(yaml.safe_load(file.read_text()), teacher, images)
    run = api.train(config, tmp_path / "run")
    report = verify(run.export(tmp_path / "out"))
    counts = {int(name.removeprefix("runs in ")) for name in (c.name for c in report.checks) if name.startswith("runs in ")}
    assert report.ok and counts >= {config.objective.steps}
    if "hyper-sd" in file.name:
        assert counts == {1, 2, 4} and (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("family", ["sd", "zimage"])
def test_a_student_of_guidance_goes_on_to_few_steps_with_the_scale_it_is_fed(family, folders, images, tmp_path):
    """Meng et al. 2022, both stages: the second is taught by the first's one pass, at every scale."""
    scales = {"guidance": [1.0, 5.0]}
    tree = {
        "teacher": {"path": str(folders[family]), "guidance": 3.0},
        "student": {"weights": "full"},
        "data": {"images": images},
        "train": {"rounds": 2, "batch": 2, "preview_every": 1000, "device": "cpu"},
        "stages": [
            {"objective": {"name": "guidance", "steps": 4, **scales}},
            {"objective": {"name": "progressive", "steps": 2, **scales}, "teacher": "previous"},
        ],
    }
    run = api.train(parse(tree), tmp_path / "run")
    assert verify(run.export(tmp_path / "out")).ok
    assert "trained at scales from 1 to 5" in (tmp_path / "out" / "README.md").read_text()
