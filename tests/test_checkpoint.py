"""A checkpoint is whole or absent, whatever happens while it is written."""

import json
import os
import shutil

import pytest
import torch

from fewstep import checkpoint


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


def files(value):
    return {
        "student": {"a.weight": torch.full((3, 2), float(value)), "b": torch.tensor(value)},
        "optimizer-student": {"a.weight:step": torch.tensor(float(value)), "a.weight:exp_avg": torch.full((3, 2), 0.5 * value)},
        "ema": {"half": torch.full((4,), value, dtype=torch.bfloat16)},
    }


def write(folder, round_, keep=2):
    return checkpoint.save(folder, round_, files(round_), {"roles": ["student"], "grid": [1.0, 0.5]}, keep=keep)


def holds(place, round_):
    found, state = checkpoint.load(place)
    assert state["round"] == round_ and state["roles"] == ["student"] and state["grid"] == [1.0, 0.5]
    for name, tensors in files(round_).items():
        assert found[name].keys() == tensors.keys()
        assert all(torch.equal(found[name][k], v) and found[name][k].dtype == v.dtype for k, v in tensors.items())
    return True


def test_what_was_saved_is_loaded(tmp_path):
    place = write(tmp_path / "checkpoints", 7)
    assert place.name == "step-0000007" == checkpoint.latest(tmp_path / "checkpoints").name
    assert holds(place, 7)
    names = ["ema.safetensors", "optimizer-student.safetensors", "state.json", "student.safetensors"]
    assert sorted(f.name for f in place.iterdir()) == names
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-0000007"]


def test_where_there_is_none_there_is_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_rounds_are_ordered_as_numbers(tmp_path):
    for round_ in (2, 10, 999_999, 1_000_000):
        write(tmp_path, round_, keep=9)
    assert checkpoint.latest(tmp_path).name == "step-1000000"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path, keep):
    for round_ in range(1, 6):
        write(tmp_path, round_, keep=keep)
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"step-{r:07d}" for r in range(6 - keep, 6)]


def test_two_are_kept_unless_told_otherwise(tmp_path):
    for round_ in range(1, 5):
        write(tmp_path, round_)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-0000003", "step-0000004"]


def test_leftovers_of_a_kill_are_swept_and_nothing_else(tmp_path):
    write(tmp_path, 1)
    shutil.copytree(tmp_path / "step-0000001", tmp_path / ".writing-123")
    shutil.copytree(tmp_path / "step-0000001", tmp_path / ".removing-step-0000000")
    (tmp_path / ".DS_Store").touch()  # a file manager's, not ours
    assert checkpoint.latest(tmp_path).name == "step-0000001"
    write(tmp_path, 2)
    assert sorted(f.name for f in tmp_path.iterdir()) == [".DS_Store", "step-0000001", "step-0000002"]


def test_the_same_round_may_be_saved_again(tmp_path):
    write(tmp_path, 3)
    write(tmp_path, 3)
    assert holds(checkpoint.latest(tmp_path), 3)


# Damage is a sentence that says which folder to remove.


def damaged(place):
    with pytest.raises(ValueError, match="is damaged") as error:
        checkpoint.load(place)
    assert str(place) in str(error.value) and "remove that folder to go on from the one before it" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("left", [0, 7, -1])
@pytest.mark.parametrize("name", ["student", "optimizer-student", "ema"])
def test_a_truncated_file_is_damage(tmp_path, name, left):
    place = write(tmp_path, 1)
    file = place / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    assert f"{name}.safetensors is {file.stat().st_size} bytes long" in damaged(place)


def test_a_file_of_the_right_size_that_is_none_is_damage(tmp_path):
    place = write(tmp_path, 1)
    file = place / "student.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    damaged(place)


def test_a_missing_file_is_damage(tmp_path):
    place = write(tmp_path, 1)
    (place / "ema.safetensors").unlink()
    damaged(place)


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"format": 1}', b'{"format": 1, "files": {"x": 1}}']
)
def test_a_missing_or_broken_state_is_damage(tmp_path, content):
    place = write(tmp_path, 1)
    (place / "state.json").unlink()
    if content is not None:
        (place / "state.json").write_bytes(content)
    damaged(place)


def test_another_format_is_said_to_be_one(tmp_path):
    place = write(tmp_path, 1)
    state = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, this fewstep reads 1; use the version that wrote it"):
        checkpoint.load(place)


# A kill: every operation on files may be the one that is never made, or the last one that is.


def operations(monkeypatch, after):
    """Counts file operations; the one numbered `after` (None: none) raises Killed before it is made, or right after."""
    made = []

    def breaking(place, name):
        real = getattr(place, name)

        def instead(*args, **kwargs):
            made.append(name)
            if after is not None and len(made) == after // 2 + 1 and after % 2 == 0:
                raise Killed
            number = len(made)
            try:
                return real(*args, **kwargs)
            finally:
                if after is not None and number == after // 2 + 1:
                    raise Killed

        monkeypatch.setattr(place, name, instead)

    breaking(checkpoint, "save_file")
    for name in ("rename", "fsync", "mkdir", "unlink", "rmdir"):  # shutil.rmtree unlinks file by file
        breaking(os, name)
    return made


def test_a_kill_between_any_two_operations_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    start = tmp_path / "start"
    for round_ in (1, 2):  # `keep` are there: the save to come also removes one
        write(start, round_)
    (start / ".writing-1").mkdir()

    def ready(folder):
        return shutil.copytree(start, folder)

    with monkeypatch.context() as patch:
        folder = ready(tmp_path / "whole")
        made = operations(patch, None)
        write(folder, 3)
    assert {"save_file", "rename", "fsync", "mkdir", "unlink", "rmdir"} <= set(made)
    found = set()
    for after in range(2 * len(made)):
        folder = ready(tmp_path / f"killed-{after}")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            operations(patch, after)
            write(folder, 3)
        place = checkpoint.latest(folder)
        round_ = int(place.name.split("-")[1])
        found.add(round_)
        assert round_ in (2, 3) and holds(place, round_)
        for other in folder.glob("step-*"):
            assert holds(other, int(other.name.split("-")[1]))
        write(folder, 4)  # and the next save is not hindered
        assert holds(checkpoint.latest(folder), 4)
        assert not list(folder.glob(".*"))
    assert found == {2, 3}
