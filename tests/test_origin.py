"""Which commit a file is said to be made by."""

import subprocess

import pytest

from fewstep import origin


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty repository, whose origin.py this module is taken for."""
    monkeypatch.setattr(origin, "__file__", str(tmp_path / "origin.py"))
    (tmp_path / "origin.py").write_text("")
    git(tmp_path, "init")
    origin.git_hash.cache_clear()
    yield tmp_path
    origin.git_hash.cache_clear()


def git(folder, *asked):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", *who, *asked], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_a_changed_checkout_is_told_from_its_commit(checkout):
    git(checkout, "add", "."), git(checkout, "commit", "-m", "all")
    commit = git(checkout, "rev-parse", "HEAD")
    assert origin.git_hash() == commit
    (checkout / "origin.py").write_text("changed")
    assert origin.git_hash() == commit, "what a process says of itself is as it was when it first asked"
    origin.git_hash.cache_clear()
    assert origin.git_hash() == commit + "+"


def test_an_environment_inside_somebody_elses_checkout_has_no_commit(checkout):
    (checkout / "theirs").write_text("")
    git(checkout, "add", "theirs"), git(checkout, "commit", "-m", "theirs")
    assert origin.git_hash() is None
