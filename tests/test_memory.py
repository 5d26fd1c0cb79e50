"""Memory: what is let go of, what is kept small, and that `plan` predicts what a run holds."""

import weakref
from pathlib import Path

import pytest
import torch
from tiny import MAKERS, save
from torch import nn

from fewstep import api
from fewstep.config import parse
from fewstep.costs import Ledger
from fewstep.forecast import forecast, told
from fewstep.preview import Preview


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


def config(teacher, prompts, *, weights="lora", objective=None, storage="whole", **train):
    path, size = teacher
    kind = {"weights": weights, "rank": 2} if weights == "lora" else {"weights": "full"}
    found = objective or {"name": "dmd", "steps": 2, "critic_turns": 1}
    return parse(
        {
            "teacher": {"path": path, "guidance": 3.0, "size": size, "storage": storage},
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

    def opened(*asked):
        study = open_study(*asked)
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


# What is predicted.


def measured(config, folder, monkeypatch):
    """The most bytes of tensors that a true run held: while encoding, while training, while drawing the last pictures."""
    ledger, found = Ledger(), {}

    def opened(config, open_study=api.open_study):
        study = open_study(config)
        networks = [v for v in study.teacher.pipe.components.values() if isinstance(v, nn.Module)]
        ledger.hold(x for net in (*networks, *(r.net for r in study.roles.values())) for x in (*net.parameters(), *net.buffers()))
        return study

    def sourced(*given, open_source=api.open_source, **named):
        kept = []
        with ledger:
            found["encoding"] = ledger.highest(lambda: kept.append(open_source(*given, **named)))
        return kept[0]

    def trained(job, fit=api.fit, **options):
        with ledger:
            ledger.highest(lambda: fit(job, **options))

    def drawn(preview, *given, draw=Preview.__call__):
        found["training"] = ledger.peak
        found["pictures"] = ledger.highest(lambda: draw(preview, *given))

    monkeypatch.setattr(api, "open_study", opened)
    monkeypatch.setattr(api, "open_source", sourced)
    monkeypatch.setattr(api, "fit", trained)
    monkeypatch.setattr(Preview, "__call__", drawn)
    monkeypatch.setattr(api.Study, "draw_teacher", lambda study, cond, steps, draw=api.Study.draw_teacher: draw(study, cond, 2))
    api.train(config, folder)
    return found


def predicted(config):
    """The same, from the configs alone."""
    phases = forecast(config)["phases"]
    turns = [peak for name, peak in phases.items() if name.endswith("turn")]
    encoding = [phases[name] for name in ("encoding", "encoding images", "teacher pairs") if name in phases]
    return {"encoding": max(encoding), "training": max(turns), "pictures": phases["pictures"]}


CONSISTENCY = {"name": "consistency", "steps": 2}
CASES = {
    "sd, consistency, full, checkpointing, bfloat16": (
        "sd",
        {"weights": "full", "objective": CONSISTENCY, "checkpointing": True, "batch": 8, "dtype": "bfloat16"},
    ),
    "sd3, consistency, lora, checkpointing": ("sd3", {"weights": "lora", "objective": CONSISTENCY, "checkpointing": True}),
    "flux, dmd, full": ("flux", {"weights": "full"}),
    "the zoo's": ("zoo", {"weights": "lora", "batch": 8}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_forecast_is_within_15_percent_of_what_a_run_holds(teachers, prompts, tmp_path, monkeypatch, case):
    name, wishes = CASES[case]
    wanted = config(("zoo:sprites-sd", None) if name == "zoo" else teachers(name), prompts, **wishes)
    guess = predicted(wanted)
    assert guess == pytest.approx(measured(wanted, tmp_path / "run", monkeypatch), rel=0.15)


def test_what_cannot_be_played_without_weights_is_said_not_to_be_predicted(teachers, prompts, monkeypatch):
    def reads(study, *given):
        return float(next(study.roles["student"].parameters()).sum())

    monkeypatch.setattr("fewstep.forecast._train", reads)
    assert set(told(config(teachers("sd"), prompts))) == {"peak"}
    assert "reads what the device has computed" in told(config(teachers("sd"), prompts))["peak"]


def test_a_ledger_counts_what_is_alive_once():
    x = torch.zeros(10)
    with Ledger() as ledger:
        assert ledger.hold([x, x]) == ledger.held == 40 and ledger.hold([x.view(2, 5)]) == 0
        made = [x.exp()]
        assert ledger.held == 80
        assert ledger.highest(lambda: (made[0] + 1).sin().sum()) == 80 + 40 + 40 and ledger.held == 80
        made = [made[0].reshape(5, 2)[1:]]
        assert ledger.held == 80, "a view keeps what it is a view of"
        made.clear()
        assert ledger.held == 40
        p = nn.Parameter(torch.ones(10))
        ledger.mark([p])
        ledger.highest(lambda: (p * x).exp().sum().backward())
        assert ledger.gradients in (0, 40) and p.grad is not None and ledger.held == 40 + 40 + 40
