"""A stage that an earlier student teaches: the pairs it learns from are its tutor's own."""

import pytest
import torch
from staged import begun

from fewstep import api, checkpoint
from fewstep.config import parse
from fewstep.data import open_source, pairs
from fewstep.sampling import ddim, sample


@pytest.fixture
def straightened(teacher, tmp_path):
    """(sampler, last objective, **student) -> Config: reflow, then a stage that the reflowed student teaches."""
    words = tmp_path / "words.txt"
    words.write_text("a red circle\na blue square\na cross")

    def make(sampler="ddim", name="regression", lr=1e-3, **student):
        train = {"rounds": 1, "batch": 2, "lr": lr, "save_every": 1, "log_every": 1, "device": "cpu"}
        plain = {
            "teacher": {"path": teacher, "guidance": 2.0},
            "student": {"rank": 2, **student},
            "data": {"prompts": str(words), "pairs": 3, "pairs_steps": 3},
            "train": train,
            "stages": [
                {"objective": {"name": FIRST[sampler], "steps": 2, "sampler": sampler}},
                {"objective": {"name": name, "steps": 1}, "teacher": "previous", "train": {"lr": 1e-3}},
            ],
        }
        return parse(plain)

    return make


FIRST = {"ddim": "reflow", "renoise": "dmd1"}  # objectives that learn from pairs and are deployed so


def known(study, wish):
    return open_source(study.teacher, prompts=study.config.data.prompts, images_needed=False, pairs=wish, cache=None)


@pytest.mark.parametrize("sampler", ["ddim", "renoise"])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_a_student_is_taught_by_its_tutors_own_pairs(straightened, tmp_path, weights, sampler):
    """At the times the tutor is deployed at (in three steps samplers differ), without fresh noise, and unguided: it is guided."""
    config = straightened(sampler, weights=weights)
    _, study = begun(config, tmp_path / "run")
    source = known(study, study.pairs(config.stages[0]))
    student, times = study.student(study.roles["student"]), study.teacher.grid(3, sampler)  # still as the tutor is
    with torch.no_grad():
        own = sample(student, source.noise, times, study.teacher.encode(source.prompts), step=ddim, rng=None)
    torch.testing.assert_close(source.latents, own, rtol=1e-4, atol=1e-4)
    assert (known(study, study.pairs()).latents - own).abs().max() > 1e-2


def test_pairs_are_drawn_anew_for_another_tutor_and_for_no_other_reason(straightened, tmp_path, monkeypatch):
    drawn, plain = [], pairs._draw

    def draw(teacher, wish, *more):
        drawn.append(wish.drawn_by)
        return plain(teacher, wish, *more)

    def fit(job, **_):
        moved = {k: v + job.settings.lr for k, v in job.roles["student"].weights().items()}
        checkpoint.save(job.folder / "checkpoints", job.settings.rounds, {"ema": moved}, {}, keep=2)

    def run(folder, **changes):
        drawn.clear()
        api.train(straightened(**changes), tmp_path / folder)
        return [bool(who) for who in drawn]

    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pairs, "_draw", draw)
    monkeypatch.setattr(api, "fit", fit)
    assert run("first") == [False, True]
    assert run("again") == []
    assert run("other tutor", lr=1e-2) == [True]
    assert run("originals", lr=2e-2, name="flow_guided") == []


def test_a_tutor_is_its_weights_and_how_they_count(straightened, tmp_path):
    """The same matrices under another alpha are another student."""
    tutors = []
    for folder, alpha in (("a", 2.0), ("b", 8.0)):
        config = straightened(alpha=alpha)
        torch.manual_seed(0)
        left, study = begun(config, tmp_path / folder)
        tutors.append((left, study.pairs(config.stages[0]).drawn_by))
    (a, first), (b, second) = tutors
    assert all(torch.equal(v, b[k]) for k, v in a.items()) and first != second
