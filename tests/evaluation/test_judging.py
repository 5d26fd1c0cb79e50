"""`fewstep eval` and `fewstep report`: what is judged, where the numbers go, and what is refused before anything is drawn."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from fewstep import judging
from fewstep.evaluation import results
from fewstep.evaluation.images import save_folder
from fewstep.evaluation.protocol import Protocol, describe, judge, load_protocol
from fewstep.judging import Row, evaluate, report_runs
from fewstep.zoo.sprites import captions, draw

pytestmark = pytest.mark.filterwarnings("ignore:.*span less than")
CLIP = "zoo:sprites-clip"
WHOLE = Protocol(
    name="whole",
    prompts="zoo:sprites",
    n=40,
    seed=7,
    extractor=CLIP,
    clip=CLIP,
    reference="zoo:sprites",
    accuracy=True,
    kid_subsets=5,
)


@pytest.fixture
def place(tmp_path, monkeypatch, zoo_clip, quick_reader):
    """An empty working folder with the protocols whole.yaml and plain.yaml."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    plain = WHOLE.model_copy(update={"name": "plain", "accuracy": False, "clip": None})
    for protocol in (WHOLE, plain):
        (tmp_path / f"{protocol.name}.yaml").write_text(json.dumps(protocol.model_dump(mode="json")))
    return tmp_path


def score(target, protocol="whole.yaml", out=None, steps=(), fresh=True):
    return evaluate(target, protocol, out=out, steps=list(steps), fresh=fresh, teacher=True)


def trained(folder, rounds, teacher="zoo:sprites-sd"):
    """A run folder, as far as judging looks into it: a config, and a checkpoint of a round."""
    (folder / f"checkpoints/step-{rounds:07d}").mkdir(parents=True)
    tree = {"teacher": {"path": teacher}, "objective": {"name": "dmd"}, "data": {"prompts": "zoo:sprites"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


@pytest.fixture
def model(place, monkeypatch):
    """A run folder whose student draws true drawings; asked.append((steps, prompts, bar)) whenever it does."""
    asked = []

    def row(kind, n):
        def drawn(prompts, bar):
            asked.append((n, len(prompts), bar))
            return draw(WHOLE.seed, WHOLE.n)[0][: len(prompts)]

        return Row(kind, n, drawn)

    trained(place / "run", 6)
    monkeypatch.setattr(judging, "_rows", lambda *_: ([row("teacher", 50), row("student", 4)], {}, {"round": 6}))
    return asked


# Folders of images


def test_images_are_judged_by_their_own_prompts(place):
    images, texts = draw(7, 40)
    other = texts[1:] + texts[:1]
    save_folder("mine", images, other, range(40))
    with pytest.warns(UserWarning, match="by the prompts of mine/manifest.jsonl, not by those of protocol 'whole'"):
        found, where = score("mine")
    (row,) = found["rows"]
    assert row == {"model": "images", "name": "mine"} | judge(images, other, WHOLE)
    assert found["protocol"]["prompts"] == "mine/manifest.jsonl"
    assert found["protocol"]["prompts_sha256"] != describe(WHOLE)["prompts_sha256"]
    with pytest.raises(ValueError, match="prompts_sha256"):
        results.merge(found, results.new([], describe(WHOLE)))
    assert where.name == "mine.results.json" and results.read(where) == found


def test_images_of_the_protocols_prompts_are_said_to_be_so(place):
    save_folder("mine", *draw(7, 40), range(40))
    found, _ = score("mine", steps=[4])
    assert describe(WHOLE).items() <= found["protocol"].items() and found["rows"][0]["steps"] == 4


def test_images_without_prompts_have_no_scores_of_them(place):
    save_folder("mine", *draw(7, 40), range(40))
    (place / "mine/manifest.jsonl").unlink()
    with pytest.warns(UserWarning, match="mine has no manifest.jsonl: CLIP score and accuracy, .*, are left out"):
        found, _ = score("mine")
    assert not {"clip", "accuracy", "accuracy_one", "latency_ms", "steps"} & found["rows"][0].keys()
    assert found["protocol"]["prompts"] is None and found["protocol"]["prompts_sha256"] is None
    assert "images" in judging.table(found)


def test_a_folder_of_images_is_not_written_into(place):
    save_folder("a/mine", *draw(7, 40), range(40))
    save_folder("b/mine", *draw(8, 40), range(40))
    held = sorted(place.glob("*/mine/*"))
    first = score("a/mine", "plain.yaml")[1]
    before = first.read_bytes()
    with pytest.raises(ValueError, match="mine.results.json holds results of another target, a/mine; name another place"):
        score("b/mine", "plain.yaml")
    assert first.read_bytes() == before and sorted(place.glob("*/mine/*")) == held
    assert score("a/mine", "plain.yaml")[1] == first


def test_too_few_images_are_refused_and_more_are_said(place):
    save_folder("mine", *draw(7, 40), range(40))
    file = place / "mine" / "000000.png"
    Image.open(file).save(place / "mine" / "more.png")
    (place / "mine/manifest.jsonl").unlink()
    with pytest.warns(UserWarning, match="judges 40 of the 41 images, the first by name"):
        score("mine", "plain.yaml")
    for gone in (file, place / "mine" / "more.png"):
        gone.unlink()
    with pytest.raises(ValueError, match="mine has 39 images, protocol 'plain' judges 40; draw more, or .* .--n 39."):
        score("mine", "plain.yaml")
    for gone in sorted((place / "mine").glob("*.png"))[7:]:
        gone.unlink()
    with pytest.raises(ValueError, match="mine has 7 images, protocol 'plain' judges 40; draw more, at least 8 are needed$"):
        score("mine", "plain.yaml")


# What draws


@pytest.mark.parametrize(
    ("out", "protocol", "said"),
    [
        ("run", "plain.yaml", "run is a folder; name a file with --out"),
        ("mine.txt/r.json", "plain.yaml", "mine.txt is a file; name another place"),
        ("mine.txt", "plain.yaml", "mine.txt is there and is no results file of fewstep"),
        ("old.json", "plain.yaml", "old.json holds results of another protocol, 'sprites'"),
        (None, "cats.yaml", "prompt 1 is 'a cat'; set accuracy: false"),
        (None, "few.yaml", "p.txt has 1 prompts, protocol 'few' wants 40; add some, at least 8 are needed$"),
    ],
)
def test_what_cannot_be_judged_or_kept_is_refused_before_anything_is_drawn(place, model, out, protocol, said):
    (place / "mine.txt").write_text("years of work")
    (place / "p.txt").write_text("a cat\n")
    (place / "cats.txt").write_text("a cat\n" * 40)
    for name, prompts in (("few", "p.txt"), ("cats", "cats.txt")):
        changed = WHOLE.model_copy(update={"name": name, "prompts": prompts})
        (place / f"{name}.yaml").write_text(json.dumps(changed.model_dump(mode="json")))
    results.write(place / "old.json", results.new([], {"name": "sprites", "hash": "a"}))
    before = {f: f.read_bytes() for f in place.rglob("*") if f.is_file()}
    with pytest.raises(ValueError, match=said):
        score("run", protocol, out and place / out)
    assert not model and before == {f: f.read_bytes() for f in place.rglob("*") if f.is_file()}


def test_pictures_that_accuracy_cannot_be_read_of_cost_one_picture(place, model, monkeypatch):
    asked = []

    def large(prompts, bar):
        asked.append(len(prompts))
        return np.full((len(prompts), 96, 80, 3), 99, np.uint8)

    monkeypatch.setattr(judging, "_rows", lambda *_: ([Row("student", 4, large)], {}, {}))
    with pytest.raises(ValueError, match="these are 80x96; set accuracy: false in it, or: --protocol inception"):
        score("run")
    assert asked == [1]


def test_a_stopped_eval_keeps_its_rows_and_the_old_results(place, model, monkeypatch):
    score("run", "plain.yaml")
    old = (place / "run/results.json").read_bytes()
    whole = judging._measure

    def stopped(row, *rest):
        if row.model == "student":
            raise KeyboardInterrupt
        return whole(row, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(judging, "_measure", stopped)
        with pytest.warns(UserWarning, match="stopped; the rows measured so far .1. are in"), pytest.raises(KeyboardInterrupt):
            score("run", "plain.yaml")
    (part,) = (place / "run").glob(f"*{results.PARTIAL}")
    assert [r["model"] for r in results.read(part)["rows"]] == ["teacher"]
    assert (place / "run/results.json").read_bytes() == old
    score("run", "plain.yaml")
    assert sorted(f.name for f in (place / "run").iterdir()) == ["checkpoints", "config.yaml", "results.json"]


def test_results_of_another_protocol_stay_and_the_report_shows_both(place, model):
    first, second = (score("run", f"{name}.yaml")[1] for name in ("whole", "plain"))
    assert (first.name, second.name) == ("results.json", "results.plain.json")
    assert results.read(first)["protocol"]["name"] == "whole"
    text = report_runs([place / "run"], place / "report.html").read_text("utf-8")
    assert "Protocol whole" in text and "Protocol plain" in text


def test_rows_of_the_same_round_stay_where_they_are_not_measured_again(place, model, monkeypatch):
    def measured(*names, **reached):
        rows = [Row(kind, n, lambda prompts, bar: draw(9, 40)[0][: len(prompts)]) for kind, n in names]
        monkeypatch.setattr(judging, "_rows", lambda *_: (rows, {}, reached))
        return score("run", "plain.yaml")[0]["rows"]

    first = score("run", "plain.yaml")[0]["rows"]
    measured(("student", 8), round=6)
    again = measured(("student", 4), round=6)
    assert [(r["model"], r["steps"]) for r in again] == [("teacher", 50), ("student", 4), ("student", 8)]
    assert again[0] == first[0] and again[1]["fd"] != first[1]["fd"]
    assert again == results.read(place / "run/results.json")["rows"]
    for reached in ({"round": 7}, {}, {}):
        assert [(r["model"], r["steps"]) for r in measured(("student", 4), **reached)] == [("student", 4)]


def test_timing_draws_no_bar_and_one_picture(place, model):
    score("run", "plain.yaml")
    assert model.count((4, 1, "")) == 4 and [a for a in model if a[2]] == [
        (50, 40, "teacher, 50 steps"),
        (4, 40, "student, 4 steps"),
    ]


def test_what_a_card_says_of_time_is_measured_here(place, model):
    known = {"model": "teacher", "steps": 50, "fd": 1.5, "latency_ms": 1e9}
    rows, _, _ = judging._rows()
    row = judging._measure(rows[0], captions(7, 40), load_protocol("plain.yaml"), known)
    assert row["fd"] == 1.5 and row["latency_ms"] < 1e8
    assert {n for _, n, _ in model} == {1}


# Reports


def test_results_say_their_round_and_a_report_says_where_it_is_an_older_one(place, model):
    assert score("run", "plain.yaml")[0]["environment"]["round"] == 6
    assert "measures it anew" not in report_runs([place / "run"], place / "report.html").read_text("utf-8")
    trained(place / "run", 12)
    text = report_runs([place / "run"], place / "report.html").read_text("utf-8")
    assert (
        "results.json was measured at round 6, not at round 12; `fewstep eval" in text
        and "run --protocol plain` measures" in text
    )


def test_a_checkpoint_is_judged_and_reported_in_its_own_folder(place, model):
    step = place / "run/checkpoints/step-0000006"
    found, where = score(step)
    assert where == step / "results.json" and not (place / "run/results.json").exists()
    assert [r["steps"] for r in found["rows"]] == [50, 4]
    page = report_runs([step], place / "report.html").read_text()
    assert "step-0000006" in page and "Nothing is measured" not in page


@pytest.mark.parametrize(
    ("teacher", "by"), [("zoo:sprites-sd", "--protocol sprites"), ("a/b", "--reference FOLDER --prompts FILE")]
)
def test_a_run_that_is_not_scored_has_a_report_of_its_training_that_says_how_it_is(tmp_path, teacher, by):
    pytest.importorskip("matplotlib")
    trained(tmp_path / "run", 6, teacher)
    (tmp_path / "run/metrics.jsonl").write_text('{"round": 1, "student/loss": 2.0}\n')
    (tmp_path / "run/grids").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "run/grids/step-0000006.png")
    text = report_runs([tmp_path / "run"], tmp_path / "report.html").read_text("utf-8")
    assert f"Nothing is measured of {tmp_path / 'run'} yet; `fewstep eval {tmp_path / 'run'} {by}` makes its table" in text
    assert text.count("data:image/png") == 2 and "<table" not in text and "protocol." not in text


def test_a_report_leaves_out_a_line_that_a_kill_cut_short(tmp_path):
    results.write(tmp_path / "results.json", results.new([], {"hash": "a"}))
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"round": 1, "loss": 2.0}\n{"round": 2, "lo')
    report_runs([tmp_path], tmp_path / "report.html")
    log.write_text('{"round": 1, "lo\n{"round": 2, "loss": 1.0}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 1 is not JSON .*; remove that line"):
        report_runs([tmp_path], tmp_path / "report.html")
