"""Memory: what is let go of, what is kept small, and that `plan` predicts what a run holds."""

import weakref
from pathlib import Path

import pytest
from tiny import MAKERS, save

from fewstep import api
from fewstep.config import parse


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """name of a family -> (folder of a tiny pipeline of it, its size)."""
    made = {}

    def make(name):
        if name not in made:
            maker, size = MAKERS[name]
            made[name] = str(save(maker(), tmp_path_factory.mktemp(name) / "pipe")), size
        return made[name]

    return make


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    (tmp_path / "prompts.txt").write_text("a red circle\nblue\n")
    return str(tmp_path / "prompts.txt")


def config(teacher, prompts, *, weights="lora", objective=None, **train):
    path, size = teacher
    kind = {"weights": weights, "rank": 2} if weights == "lora" else {"weights": "full"}
    found = objective or {"name": "dmd", "steps": 2, "critic_turns": 1}
    return parse(
        {
            "teacher": {"path": path, "guidance": 3.0, "size": size},
            "student": kind,
            "critic": kind,
            "objective": found,
            "data": {"prompts": prompts, "pairs": 4 if found["name"] != "dmd" else 0, "pairs_steps": 2},
            "train": {"rounds": 2, "batch": 3, "lr": 1e-3, "device": "cpu", **train},
        }
    )


# What is let go of.


def test_text_encoders_are_gone_when_training_begins_and_pictures_are_drawn_without(teachers, prompts, tmp_path, monkeypatch):
    held, fit = {}, api.fit

    def watched(job, **options):
        assert held["text_encoder"]() is None, "something still holds the text encoder"
        assert held["vae"]() is not None, "previews need it"
        return fit(job, **options)

    def opened(config):
        study = open_study(config)
        held.update({name: weakref.ref(getattr(study.teacher.pipe, name)) for name in ("text_encoder", "vae")})
        return study

    open_study = api.open_study
    monkeypatch.setattr(api, "open_study", opened)
    monkeypatch.setattr(api, "fit", watched)
    run = api.train(config(teachers("sd"), prompts), tmp_path / "run")
    assert list((Path(run.folder) / "grids").glob("*.png"))
    assert run.sample(["a red circle"]).shape == (1, 64, 64, 3), "a finished run has its text encoder"


def test_a_process_that_paints_nothing_lets_go_of_the_autoencoder_too(teachers, prompts):
    study = api.open_study(config(teachers("sd"), prompts))
    net = study.teacher.net
    study.encoded(painting=False)
    assert study.teacher.pipe.vae is study.teacher.pipe.text_encoder is None
    assert study.teacher.net is net and len(study.null) == 1
