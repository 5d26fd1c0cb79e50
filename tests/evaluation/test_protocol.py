"""Protocols, the row they give, results.json, the report, timings."""

import base64
import io
import json
import os
import re
import time

import numpy as np
import pytest
from PIL import Image

from fewstep.evaluation import latency, protocol, results
from fewstep.evaluation.images import save_folder
from fewstep.evaluation.protocol import Protocol, describe, floor, judge, load_prompts, load_protocol
from fewstep.evaluation.reference import load_reference, reference_images
from fewstep.evaluation.report import write_report
from fewstep.zoo.sprites import captions, draw

pytestmark = pytest.mark.filterwarnings("ignore:.*span less than")
FIELDS = {
    "name": "tiny",
    "prompts": "zoo:sprites",
    "n": 40,
    "seed": 7,
    "extractor": "zoo:sprites-clip",
    "clip": "zoo:sprites-clip",
    "reference": "zoo:sprites",
    "accuracy": True,
    "kid_subsets": 5,
}
ROW = ["n", "fd", "kid", "kid_stderr", "precision", "recall", "density", "coverage", "clip", "accuracy", "accuracy_one"]
ROW += ["saturated", "pixel_mean", "pixel_std", "duplicates"]
TINY = Protocol(**FIELDS)
PLAIN = TINY.model_copy(update={"accuracy": False, "clip": None})


@pytest.fixture
def written(tmp_path):
    def write(text):
        file = tmp_path / "p.yaml"
        file.write_text(text)
        return file

    return write


def as_yaml(**changes):
    return "".join(f"{k}: {json.dumps(v)}\n" for k, v in (FIELDS | changes).items())


def test_a_protocol_reads_back(written):
    assert load_protocol(written(as_yaml())) == TINY


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (as_yaml() + "extracter: x\n", "unknown key 'extracter'; did you mean extractor?"),
        (as_yaml() + "zzz: x\n", "unknown key 'zzz'; the keys are name, prompts"),
        (as_yaml(n="40"), "n: input should be a valid integer"),
        (as_yaml(n=0), "n: .*greater than or equal"),
        (as_yaml() + "n: 50\n", "key 'n' is given twice"),
        ("name: x\n", "prompts: field required"),
        ("- a\n", "a protocol is a mapping"),
        ("a: [\n", "p.yaml"),
    ],
)
def test_a_faulty_protocol_is_refused_by_name(written, text, says):
    with pytest.raises(ValueError, match=says):
        load_protocol(written(text))


def test_an_unknown_protocol_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown protocol 'sprite'; did you mean sprites"):
        load_protocol("sprite")
    with pytest.raises(ValueError, match="no protocol file"):
        load_protocol("nowhere.yaml")


def test_those_shipped_are_valid_and_unlike():
    found = [load_protocol(f.stem) for f in protocol.SHIPPED.glob("*.yaml")]
    assert {p.name for p in found} == {"sprites", "sprites-quick"} and len({p.hash for p in found}) == 2


def test_the_hash_moves_with_whatever_moves_a_number():
    changes = [{"n": 41}, {"seed": 8}, {"extractor": "x"}, {"clip": None}, {"reference": "x"}, {"kid_size": 9}, {"prompts": "x"}]
    hashes = {TINY.hash} | {TINY.model_copy(update=c).hash for c in changes}
    assert len(hashes) == 1 + len(changes) and all(re.fullmatch("[0-9a-f]{16}", h) for h in hashes)
    assert TINY.model_copy(update={"batch": 3}).hash == TINY.hash
    with pytest.raises(ValueError, match="frozen"):
        TINY.n = 3


def test_prompts_are_the_worlds_captions_or_the_lines_of_a_file(tmp_path):
    assert load_prompts(TINY) == captions(7, 40)
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}\n" for i in range(50)))
    mine = TINY.model_copy(update={"prompts": str(tmp_path / "p.txt")})
    assert load_prompts(mine) == [f"prompt {i}" for i in range(40)]
    with pytest.raises(ValueError, match="has 50 prompts"):
        load_prompts(mine.model_copy(update={"n": 60}))
    with pytest.raises(ValueError, match="neither zoo:sprites nor a text file"):
        load_prompts(TINY.model_copy(update={"prompts": "nowhere.txt"}))


def test_the_row_of_true_drawings(zoo_clip, quick_reader):
    images, texts = draw(7, 40)
    row = judge(images, texts, TINY)
    assert list(row) == (ROW)
    assert row["fd"] == pytest.approx(floor(TINY), rel=1e-9)
    assert row["accuracy"] > 0.9 and abs(row["kid"]) < 5 * row["kid_stderr"] and row["duplicates"] == 0
    assert row["pixel_mean"] == pytest.approx(images.mean()) and row["n"] == 40
    json.dumps(row, allow_nan=False)


def test_a_worse_set_scores_worse(zoo_clip, quick_reader):
    images, texts = draw(7, 40)
    good, bad = judge(images, texts, TINY), judge(np.where(images > 128, 255, 0).astype(np.uint8), texts, TINY)
    assert bad["fd"] > 1.5 * good["fd"] and bad["saturated"] == 1 > good["saturated"]
    mixed = judge(images, texts[1:] + texts[:1], TINY)
    assert mixed["accuracy"] < good["accuracy"] - 0.2 and mixed["fd"] == good["fd"]
    few = judge(np.tile(images[:10], (4, 1, 1, 1)), texts, TINY)
    assert few["duplicates"] == 0.75 and few["coverage"] < good["coverage"]


def test_a_wrong_count_is_refused(zoo_clip):
    images, texts = draw(7, 39)
    with pytest.raises(ValueError, match="judges 40 samples, not 39"):
        judge(images, texts, TINY)


def test_samples_taken_from_the_reference_are_noticed(zoo_clip):
    images = reference_images("zoo:sprites", 40, PLAIN.seed + 1)
    with pytest.warns(UserWarning, match="40 of 40 images are in the reference"):
        assert judge(images, captions(8, 40), PLAIN)["fd"] < 1e-8


def test_a_reference_may_be_a_folder_or_moments(zoo_clip, tmp_path):
    from fewstep.evaluation.frechet import Moments

    images, texts = draw(7, 40)
    real = reference_images("zoo:sprites", 40, 8)
    save_folder(tmp_path / "real", real, ["x"] * 40, range(40))
    expected = judge(images, texts, PLAIN)
    by_folder = judge(images, texts, PLAIN.model_copy(update={"reference": str(tmp_path / "real")}))
    assert by_folder == pytest.approx(expected, rel=1e-6)
    extractor = protocol._extractor(PLAIN.extractor, 64)
    Moments.of(extractor(real), extractor=extractor.id).save(tmp_path / "real.npz")
    by_moments = judge(images, texts, PLAIN.model_copy(update={"reference": str(tmp_path / "real.npz")}))
    assert by_moments["fd"] == pytest.approx(expected["fd"], rel=1e-6) and "kid" not in by_moments
    for wrong in ("real", "nowhere.npz"):
        with pytest.raises(ValueError, match="nowhere.npz|neither zoo:sprites"):
            judge(images, texts, PLAIN.model_copy(update={"reference": wrong}))
    with pytest.raises(ValueError, match="only zoo:sprites can be drawn again"):
        floor(PLAIN.model_copy(update={"reference": str(tmp_path / "real")}))
    with pytest.raises(ValueError, match="holds 40 images"):
        reference_images(str(tmp_path / "real"), 41, 0)


def test_reference_features_are_kept_on_disk_for_one_extractor(zoo_clip, tmp_path, monkeypatch):
    from dataclasses import replace

    extractor = protocol._extractor(TINY.extractor, 64)
    ask = dict(source="zoo:sprites", n=40, seed=8, cache=str(tmp_path), key="k")
    first = load_reference(extractor=extractor, **ask)
    assert {f.name for f in tmp_path.iterdir()} == {"reference-k.safetensors", "reference-k.npz"}
    load_reference.cache_clear()

    def refuse(x):
        raise AssertionError("extracted again")

    again = load_reference(extractor=replace(extractor, forward=refuse), **ask)
    np.testing.assert_array_equal(first.features, again.features)
    with pytest.raises(AssertionError, match="extracted again"):
        load_reference(extractor=replace(extractor, id="another", forward=refuse), **ask)
    with pytest.raises(AssertionError, match="extracted again"):
        load_reference(extractor=replace(extractor, forward=refuse), **(ask | {"seed": 9}))


def rows():
    return [
        {"model": "teacher", "steps": 50, "fd": 0.4321, "kid": 0.001, "kid_stderr": 0.0002, "clip": 31.25, "latency_ms": 500.0},
        {"model": "student", "steps": 1, "fd": 3.875, "kid": 0.02, "kid_stderr": 0.0004, "clip": 30.5, "latency_ms": 10.5},
        {"model": "student", "steps": 4, "fd": 0.6543, "kid": 0.002, "kid_stderr": 0.0003, "clip": 31.0, "latency_ms": 40.0},
    ]


def test_results_name_what_was_used(zoo_clip, tmp_path):
    entry = describe(TINY)
    made = results.new(rows(), entry)
    results.write(tmp_path / "a" / "results.json", made)
    assert results.read(tmp_path / "a" / "results.json") == made
    assert set(made) == {"rows", "protocol", "environment"}
    assert {"python", "torch", "diffusers", "cpu", "cores", "threads", "git_commit", "date"} <= set(made["environment"])
    assert made["protocol"]["hash"] == TINY.hash and made["protocol"]["extractor_id"].startswith("open_clip:tiny-clip:")
    assert len(entry["reference_sha256"]) == len(entry["prompts_sha256"]) == 64


def test_a_kill_leaves_the_old_results_whole(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    results.write(file, results.new(rows(), {"hash": "a"}))
    old = file.read_bytes()
    for wound in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, wound, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                results.write(file, results.new(rows()[:1], {"hash": "a"}))
        assert file.read_bytes() == old and [f.name for f in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"model": "student", "steps": 1, "fd": float("nan")}, "row 0: fd is nan"),
        ({"model": "other", "steps": 1}, "teacher or student"),
        ({"model": "student"}, "steps"),
    ],
)
def test_a_row_that_says_too_little_is_refused(row, says):
    with pytest.raises(ValueError, match=says):
        results.new([row], {"hash": "a"})


def test_merging_refuses_another_protocol():
    a, b = (
        results.new(rows()[:2], {"hash": "a", "extractor_id": "x"}),
        results.new(rows()[1:], {"hash": "a", "extractor_id": "x"}),
    )
    assert results.merge(a, b)["rows"] == rows()
    with pytest.raises(ValueError, match="hash a and under b do not compare"):
        results.merge(a, b | {"protocol": {"hash": "b", "extractor_id": "x"}})
    with pytest.raises(ValueError, match="extractor_id x and under y"):
        results.merge(a, b | {"protocol": {"hash": "a", "extractor_id": "y"}})


def test_a_file_that_holds_no_results_is_refused(tmp_path):
    for text in ("[", "{}", '{"rows": [], "protocol": {}, "environment": {}}'):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(ValueError, match="r.json"):
            results.read(tmp_path / "r.json")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("report")
    Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save(folder / "grid.png")
    found = results.new(rows(), {"hash": "cafe", "name": "<b>tiny</b>"})
    records = [{"round": i, "student/loss": 1 / (i + 1), "critic/loss": 2.0, "seconds": 3} for i in range(5)]
    other = results.new(rows()[1:2], {"hash": "beef", "name": "other"})
    file = write_report(
        folder / "report.html",
        results=[found, other],
        grids=[("teacher & student", folder / "grid.png")],
        curves={"run": records},
    )
    return file.read_text("utf-8")


def test_the_report_shows_the_numbers(page):
    for text in (
        "0.432",
        "3.875",
        "0.654",
        "31.25",
        "20.00 ± 0.40",
        "500.0",
        "teacher, 50 steps",
        "student, 1 step<",
        "cafe",
        "beef",
    ):
        assert text in page, text
    assert page.count('class="best">0.654') == 1  # the better student; the teacher does not compete


def test_the_report_holds_its_pictures_and_escapes_its_text(page):
    pictures = [Image.open(io.BytesIO(base64.b64decode(d))) for d in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert len(pictures) == 4  # a plot a protocol, the grid, the curves
    assert (8, 8) in [p.size for p in pictures] and all(p.load() for p in pictures)
    assert "<b>tiny" not in page and "&lt;b&gt;tiny" in page and "teacher &amp; student" in page
    assert "<script" not in page and "http" not in page


def test_a_report_needs_neither_grids_nor_curves_nor_matplotlib(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = write_report(tmp_path / "r.html", results=[results.new(rows(), {"hash": "a"})]).read_text("utf-8")
    assert "3.875" in text and "fewstep[report]" in text and "data:image" not in text
    (tmp_path / "no.png").write_text("text")
    with pytest.raises(ValueError, match="no PNG"):
        write_report(tmp_path / "r.html", results=[], grids=[("x", tmp_path / "no.png")])


def test_timings_leave_the_warm_up_out():
    calls, syncs = [], []

    def call():
        calls.append(None)
        time.sleep(0.05 if len(calls) <= 2 else 0.002)

    found = latency.measure(call, warmup=2, repeats=5, sync=lambda: syncs.append(None))
    assert len(calls) == 7 and len(syncs) == 10
    assert 2 <= found["p50_ms"] <= found["p90_ms"] < 45 and found["repeats"] == 5
    with pytest.raises(ValueError, match="one warm-up"):
        latency.measure(call, warmup=0)
    assert 10 < latency.throughput(lambda: time.sleep(0.002), 4) < 2000
