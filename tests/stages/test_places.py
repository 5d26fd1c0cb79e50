"""Where runs lie, and where what they were made with lies: told without training anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep import checkpoint, stages
from fewstep.config import load, parse
from fewstep.folders import teacher_folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a teacher's folder and prompts in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teachers/sd").mkdir(parents=True)
    (tmp_path / "words.txt").write_text("a star\n")
    return tmp_path


def config(path="teachers/sd", words="words.txt", **parts):
    plain = {"teacher": {"path": path}, "objective": {"name": "dmd"}, "data": {"prompts": words}}
    return parse({**plain, **parts})


def trained(folder, rounds=2):
    checkpoint.save(folder / "checkpoints", rounds, {"ema": {"w": torch.zeros(1)}}, {}, keep=2)


def claim(run, resume=False):
    return stages.claimed(config(), run, resume)


def test_a_stored_config_holds_wherever_it_is_read(here, monkeypatch):
    pairs = {"data": {"prompts": "words.txt", "pairs": 8}, "objective": {"name": "reflow"}}
    for made in (config(), config(stages=[{}, {"teacher": "previous"}], **pairs)):
        stages.store(made, here / "run")
        monkeypatch.chdir("/")
        found = load(here / "run/config.yaml")
        for part in (found, *found.stages):
            assert (part.teacher.path, part.data.prompts) == (str(here / "teachers/sd"), str(here / "words.txt"))
        monkeypatch.chdir(here)
    assert [stage.teacher.net for stage in found.stages] == ["original", "previous"]
    pattern = config(data={"images": "shards/*.tar"}, objective={"name": "consistency"})
    assert stages.absolute(pattern).data.images == str(here / "shards/*.tar")


def test_a_run_is_one_from_inside_its_own_folder_too(here, monkeypatch):
    run = here / "run"
    run.mkdir()
    monkeypatch.chdir(run)
    made, dot = config(str(here / "teachers/sd"), str(here / "words.txt"), stages=[{}, {}]), Path(".")
    with claim(dot):
        stages.store(made, dot)
    assert {f.name for f in here.iterdir()} == {"run", "teachers", "words.txt"} and stages.find(dot)[0] == made
    assert list(stages.traces(dot)) == ["run/stage-1", "run/stage-2"]
    (run / "stage-1/grids").mkdir(parents=True)
    for inside, same in (("stage-1", dot), ("stage-1/grids", Path(".."))):
        monkeypatch.chdir(run / inside)
        assert stages.find(same)[1].folder == run / "stage-1" and list(stages.traces(same)) == ["stage-1"]


@pytest.mark.parametrize("path", ["zoo:sprites-sd", "owner/model"])
def test_what_is_no_local_path_is_stored_as_it_is(here, path):
    known = config(path, "zoo:sprites")
    assert stages.absolute(known) == known


def test_a_relative_path_and_its_absolute_one_are_one_setting(here):
    run = here / "run"
    stages.store(config(), run)
    trained(run)
    for same in (config(), config("./teachers/sd"), config(str(here / "teachers/sd"), str(here / "words.txt"))):
        stages.check_folder(same, run, resume=True)
    with pytest.raises(ValueError, match="was made with another data.prompts"):
        stages.check_folder(config(words="others.txt"), run, resume=True)


def test_a_folder_without_a_checkpoint_may_be_started_over(here):
    run, other = here / "run", config(train={"lr": 0.5})
    stages.store(config(), run)
    for resume in (False, True):
        stages.check_folder(other, run, resume)
    trained(run)
    for resume, said in ((False, "already holds a run"), (True, "was made with another train.lr")):
        with pytest.raises(ValueError, match=said):
            stages.check_folder(other, run, resume)


@pytest.mark.parametrize("resume", [False, True])
def test_nobody_else_trains_in_a_folder_while_its_run_does(here, resume):
    run = here / "run"
    if resume:
        stages.store(config(), run)
    with claim(run, resume):
        with pytest.raises(ValueError, match="another process is training in .*run; wait for it"), claim(run, resume):
            pass
        stages.store(config(), run)
    with claim(run, resume):
        pass


def test_a_killed_process_leaves_its_folder_free(here):
    program = """
import os
from pathlib import Path
from fewstep import stages
from fewstep.config import load
held = stages.claimed(load(Path("kept/config.yaml")), Path("run"), False)
held.__enter__()
os.kill(os.getpid(), 9)
"""
    stages.store(config(), here / "kept")
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert (here / "run" / stages.LOCK).exists()
    with claim(here / "run"):
        pass


def test_a_run_that_did_not_begin_leaves_no_folder(here):
    with pytest.raises(ValueError, match="refused"), claim(here / "run"):
        raise ValueError("refused")
    assert not (here / "run").exists()
    (here / "empty").mkdir()
    with pytest.raises(ValueError, match="refused"), claim(here / "empty"):
        raise ValueError("refused")
    assert not list((here / "empty").iterdir())


def test_a_run_is_claimed_once_by_all_its_processes(here, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with claim(here / "run"):
        assert not (here / "run").exists()


def test_a_checkpoint_of_any_stage_is_a_run_that_has_begun(here):
    run, whole = here / "run", config(stages=[{}, {}])
    stages.store(whole, run)
    trained(run / "stage-1", 300)
    with pytest.raises(ValueError, match="already holds a run"):
        stages.check_folder(whole, run, resume=False)
    stages.check_folder(whole, run, resume=True)


def test_a_stage_that_has_not_begun_is_held_to_the_teacher_of_the_one_before(here):
    first, second = stages.stages_of(config(stages=[{}, {}]), here / "run")
    assert second.taught is None
    trained(first.folder)
    assert first.taught == second.taught == first.place
    trained(second.folder)
    assert second.taught == second.place


def test_a_run_is_not_resumed_to_fewer_rounds_than_it_has(here):
    run = here / "run"
    stages.store(config(), run)
    trained(run, 200)
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"has trained 200 rounds already, more than train.rounds=199; set that to 200 or more"):
        stages.check_folder(config(train={"rounds": 199}), run, resume=True)
    stages.check_folder(config(train={"rounds": 200}), run, resume=True)
    assert (run / "config.yaml").read_bytes() == before


def test_a_folder_that_is_a_file_or_below_one_is_refused(here):
    for folder in (here / "words.txt", here / "words.txt/run"):
        with pytest.raises(ValueError, match="words.txt is a file; name a folder with --out"):
            stages.check_folder(config(), folder, resume=False)


def test_a_checkpoint_without_a_number_is_a_sentence(here):
    stages.store(config(), here / "run")
    (here / "run/checkpoints/step-abc").mkdir(parents=True)
    with pytest.raises(ValueError, match="step-abc is no checkpoint: its name ends in no number of rounds; move it elsewhere"):
        _ = stages.find(here / "run")[1].place


def test_every_seed_of_a_run_has_its_stages(here):
    parts = stages.stages_of(config(stages=[{}, {}], train={"seed": 2**32 - 1}), here)
    assert len({part.settings.seed for part in parts}) == 2


# Teachers


def test_a_path_whose_first_part_is_a_folder_is_no_hub_id(here):
    """Otherwise a slip in the name of a local folder asks the network for it."""
    with pytest.raises(ValueError, match="there is no teacher at teachers/sdd"):
        teacher_folder("teachers/sdd")
    assert teacher_folder("owner/model") is None


def test_home_is_known_of_a_teacher_too(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    (here / "teachers/sd/model_index.json").write_text("{}")
    assert teacher_folder("~/teachers/sd") == here / "teachers/sd"
    assert config("~/teachers/sd").teacher.path == os.path.expanduser("~/teachers/sd") != "~/teachers/sd"


def test_the_yardstick_of_the_zoo_is_no_teacher():
    with pytest.raises(ValueError, match="zoo:sprites-clip is not a Diffusers pipeline folder.*fewstep list teachers"):
        teacher_folder("zoo:sprites-clip")
