"""Families under objectives, trained, exported and proved: README's table, which `python eval/matrix.py` writes."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import MAKERS
from torch import nn

from fewstep.networks import Role
from fewstep.objectives import Turn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def load():
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "eval" / "matrix.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["matrix"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


matrix = load()
WHOLE = matrix.cells(list(MAKERS))


@pytest.mark.parametrize("cell", WHOLE, ids=" ".join)
def test_a_family_learns_under_an_objective_and_its_export_is_proved(cell, tmp_path):
    found = set(matrix.prove(cell, matrix.saved(cell[0], tmp_path), tmp_path))
    assert found >= {f"{what} at {n}" for what in ("times", "pixels") for n in (1, 2, 4)} | {"same seed, same picture"}


def test_the_readme_table_has_every_family_once_and_says_that_the_tests_pass():
    table = matrix.read(README)
    assert list(table) == [(family, *column) for family in MAKERS for column in matrix.COLUMNS]
    assert set(WHOLE) == {*table} and {*table.values()} == {"ok"}
    assert matrix.written(README, table) == README


@pytest.mark.parametrize("moved", [["student"], ["student", "critic"], ["student", "teacher"], []])
def test_a_turn_that_moves_others_than_its_movers_is_found(moved):
    roles = {name: Role(name, nn.Linear(2, 2), owns=True, dtype=torch.float32) for name in ("teacher", "student", "critic")}
    inner = SimpleNamespace(round=lambda step: [Turn("student", lambda *_: None)])
    turns = matrix.Watched(inner, SimpleNamespace(roles=roles)).round(0)
    next(turns)
    for name in moved:
        next(roles[name].net.parameters()).data.add_(1.0)
    if moved == ["student"]:
        assert next(turns, None) is None
    else:
        with pytest.raises(ValueError, match=r"the student's turn: .* moved, not \['student'\]"):
            next(turns)
