"""Files of results, how they are merged, and the report that shows them."""

import base64
import io
import os
import re
import time

import numpy as np
import pytest
from PIL import Image

from fewstep.evaluation import latency, results
from fewstep.evaluation.protocol import Protocol, describe
from fewstep.evaluation.report import write_report

PLACE, CLIP = "zoo:sprites", "zoo:sprites-clip"
TINY = Protocol(name="tiny", prompts=PLACE, n=40, seed=7, extractor=CLIP, clip=CLIP, reference=PLACE)


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
        ({"model": "other", "steps": 1}, "teacher, student or images"),
        ({"model": "student"}, "steps"),
        ({"model": "images", "steps": "4"}, "steps"),
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


@pytest.mark.parametrize(
    ("measured", "reached", "why"),
    [
        ({"round": 6}, {"round": 6}, ""),
        ({"round": 6}, {"round": 12}, "was measured at round 6, not at round 12"),
        ({"round": 6}, {"round": 6, "stage": 2}, "was measured at round 6, not at round 6 of stage 2"),
        ({}, {"round": 6}, "does not say at which round it was measured"),
    ],
)
def test_results_are_those_of_the_round_they_were_measured_at_alone(tmp_path, measured, reached, why):
    found = results.new(rows(), {"name": "mine", "hash": "a"})
    found["environment"] |= measured
    results.write(tmp_path / "results.json", found)
    assert results.stale(found, reached) == why
    if not why:
        assert results.measured(tmp_path, reached) == found
        return
    with pytest.warns(
        UserWarning, match=f"{why}, and is left out of the card; `fewstep eval .* --protocol mine` measures it anew"
    ):
        assert results.measured(tmp_path, reached) is None


def test_rows_measured_otherwise_or_a_latency_of_elsewhere_are_not_kept(tmp_path):
    def found(given, protocol, **environment):
        made = results.new(given, protocol)
        made["environment"] |= {"round": 6, **environment}
        return made

    a = {"hash": "a", "reference_sha256": "x"}
    results.write(tmp_path / "r.json", found(rows(), a))
    now = rows()[1:2]
    assert results.with_earlier(found(now, a), tmp_path / "r.json")["rows"] == rows()
    elsewhere = results.with_earlier(found(now, a, cpu="another"), tmp_path / "r.json")["rows"]
    assert [row["steps"] for row in elsewhere if "latency_ms" in row] == [1] and len(elsewhere) == 3
    for other in ({"hash": "a", "reference_sha256": "y"}, {"hash": "b", "reference_sha256": "x"}):
        assert results.with_earlier(found(now, other), tmp_path / "r.json")["rows"] == now
    assert results.with_earlier(found(now, a), tmp_path / "nowhere.json")["rows"] == now


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
        "0.02 ± 0.0004",
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
    assert "3.875" in text and "pip install matplotlib" in text and "data:image" not in text
    (tmp_path / "no.png").write_text("text")
    with pytest.raises(ValueError, match="no PNG"):
        write_report(tmp_path / "r.html", results=[], grids=[("x", tmp_path / "no.png")])


def test_a_row_of_images_needs_no_steps(tmp_path):
    found = results.new([{"model": "images", "name": "mine", "fd": 2.5}, *rows()], {"hash": "a"})
    text = write_report(tmp_path / "r.html", results=[found]).read_text("utf-8")
    assert ">images mine<" in text and "2.500" in text


def test_other_prompts_get_a_table_of_their_own(tmp_path):
    both = [results.new(rows(), {"hash": "a", "prompts_sha256": sha}) for sha in ("x", "y")]
    assert write_report(tmp_path / "r.html", results=both).read_text("utf-8").count("<h2>Protocol") == 2


def test_a_page_goes_over_reports_alone(tmp_path):
    write_report(tmp_path / "r.html", results=[])
    write_report(tmp_path / "r.html", results=[results.new(rows(), {"hash": "a"})])
    (tmp_path / "thesis.html").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.html is there and is no report of fewstep"):
        write_report(tmp_path / "thesis.html", results=[])
    with pytest.raises(ValueError, match="is a folder; name the page with --out"):
        write_report(tmp_path, results=[])
    assert (tmp_path / "thesis.html").read_text() == "years of work"


A, B = {"name": "first", "hash": "a"}, {"name": "second/one", "hash": "b"}


def test_results_of_two_protocols_have_files_of_their_own(tmp_path):
    assert results.place_in(tmp_path, "results", A) == tmp_path / "results.json"
    results.write(tmp_path / "results.json", results.new(rows(), A))
    assert results.place_in(tmp_path, "results", A) == tmp_path / "results.json"
    other = results.place_in(tmp_path, "results", B)
    assert other == tmp_path / "results.second-one.json"
    results.write(other, results.new(rows(), B))
    (tmp_path / f"results.0123{results.PARTIAL}").write_text("half")
    assert results.places_in(tmp_path) == [tmp_path / "results.json", other]


def test_results_go_over_those_of_the_same_protocol_and_target_alone(tmp_path, monkeypatch):
    file = tmp_path / "r.json"
    results.check_place(tmp_path / "new" / "r.json", A)
    made = results.new(rows(), A)
    made["environment"]["target"] = str(tmp_path / "mine")
    results.write(file, made)
    results.check_place(file, A)
    results.check_place(file, A, str(tmp_path / "mine"))
    with pytest.raises(ValueError, match="another protocol, 'first' .a.; name another place"):
        results.check_place(file, B)
    with pytest.raises(ValueError, match="another target, .*mine; name another place"):
        results.check_place(file, A, "yours")
    with pytest.raises(ValueError, match="is a folder; name a file with --out"):
        results.check_place(tmp_path, A)
    with pytest.raises(ValueError, match="r.json is a file; name another place"):
        results.check_place(file / "deep" / "r.json", A)
    for foreign in ("{", "[]", '{"rows": [1], "protocol": {"hash": "a"}, "environment": {}}'):
        (tmp_path / "package.json").write_text(foreign)
        with pytest.raises(ValueError, match="is no results file of fewstep; name another place"):
            results.check_place(tmp_path / "package.json", A)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="is not yours to write in"):
        results.check_place(tmp_path / "new.json", A)


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
