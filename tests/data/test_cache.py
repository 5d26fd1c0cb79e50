import os
from pathlib import Path

import pytest
import torch

from fewstep.data import cached, default_cache

KEY = {"kind": "test", "numbers": [1, 2]}


class Made:
    """Counts how often it is asked; each time its numbers are others."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return {"a": torch.arange(6.0).view(2, 3).t() + self.count, "b": torch.tensor(7, dtype=torch.bfloat16)}


def the_file(folder):
    (file,) = folder.iterdir()
    return file


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_the_second_call_reads_what_the_first_made(tmp_path):
    make = Made()
    first, second = (cached(tmp_path / "new" / "folder", KEY, make) for _ in range(2))
    assert make.count == 1
    assert equal(first, second)


def test_the_order_of_a_key_does_not_matter_and_its_content_does(tmp_path):
    make = Made()
    cached(tmp_path, KEY, make)
    cached(tmp_path, dict(reversed(KEY.items())), make)
    assert make.count == 1
    cached(tmp_path, KEY | {"numbers": [2, 1]}, make)
    assert make.count == 2


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make = Made()
    cached(None, KEY, make)
    cached(None, KEY, make)
    assert make.count == 2
    assert list(tmp_path.iterdir()) == []


def flipped(raw):
    return raw[:-1] + bytes([raw[-1] ^ 1])


@pytest.mark.parametrize("damage", [lambda raw: raw[:-4], lambda raw: raw[:20], lambda raw: b"", flipped])
def test_a_damaged_file_is_made_again_with_a_warning(tmp_path, damage):
    make = Made()
    cached(tmp_path, KEY, make)
    file = the_file(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged and made again"):
        again = cached(tmp_path, KEY, make)
    assert make.count == 2
    assert equal(cached(tmp_path, KEY, make), again)
    assert make.count == 2


def test_a_file_made_from_another_key_is_not_trusted(tmp_path):
    cached(tmp_path, KEY, Made())
    file = the_file(tmp_path)
    raw = file.read_bytes()
    cached(tmp_path, {"kind": "other"}, make := Made())
    (other,) = set(tmp_path.iterdir()) - {file}
    other.write_bytes(raw)
    with pytest.warns(UserWarning, match="another key"):
        cached(tmp_path, {"kind": "other"}, make)
    assert make.count == 2


def test_a_write_that_fails_leaves_neither_a_file_nor_a_half_one(tmp_path, monkeypatch):
    def fail(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(UserWarning, match="disk full.*set FEWSTEP_CACHE to a folder with room"):
        made = cached(tmp_path, KEY, Made())
    assert set(made) == {"a", "b"}
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_costs_only_the_storing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not be written"):
        assert set(cached(tmp_path / "file" / "cache", KEY, Made())) == {"a", "b"}


def test_the_data_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (events.append("fsync"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(Path(a).parent == Path(b).parent), replace(a, b)))
    cached(tmp_path, KEY, Made())
    assert events == ["fsync", True]


def test_whoever_may_read_the_folder_may_read_the_file(tmp_path):
    tmp_path.chmod(0o755)
    cached(tmp_path, KEY, Made())
    assert the_file(tmp_path).stat().st_mode & 0o777 == 0o644


def test_a_key_that_is_not_json_is_refused(tmp_path):
    with pytest.raises(TypeError):
        cached(tmp_path, {"x": torch.ones(1)}, Made())
    with pytest.raises(ValueError):
        cached(tmp_path, {"x": float("nan")}, Made())


def test_the_default_folder_is_the_users(monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", "/somewhere/else")
    assert default_cache() == Path("/somewhere/else")
    monkeypatch.delenv("FEWSTEP_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_cache() == Path("/home/me/.cache/fewstep")
