"""The worked example of CONTRIBUTING.md is a file that works: it registers, improves the toy world and trains a pipeline."""

import importlib
import json
import re
from pathlib import Path

import pytest
from tiny import save, tiny_sd_pipeline
from toys import play, ring, sliced_w2

from fewstep import api
from fewstep.config import parse
from fewstep.objectives import base, objectives

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The objective of the document, known by name for as long as a test runs."""
    (file,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    (tmp_path / "knowledge_of_contributing.py").write_text(file)
    monkeypatch.setattr(base, "REGISTRY", dict(base.REGISTRY))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(importlib.sys.modules, "knowledge_of_contributing", raising=False)
    importlib.import_module("knowledge_of_contributing")
    return objectives()["knowledge"]


def test_the_example_improves_a_world_of_eight_modes(example):
    world = ring(example())
    goal = world.many_steps()
    before = sliced_w2(world.sampled(), goal)
    play(example(), world, 150, 128, 2e-3)
    assert sliced_w2(world.sampled(), goal) < before / 2


def test_the_example_trains_by_its_name(example, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    tree = {
        "teacher": {"path": str(save(tiny_sd_pipeline(), tmp_path / "teacher")), "guidance": 2.0},
        "student": {"weights": "full"},
        "objective": {"name": "knowledge", "teacher_steps": 4},
        "data": {"prompts": str(prompts)},
        "train": {"rounds": 2, "batch": 2},
    }
    run = api.train(parse(tree), tmp_path / "run")
    log = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert log[0]["round"] == 2 and log[0]["student/regression"] > 0
