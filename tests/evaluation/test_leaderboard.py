"""The leaderboard: what results files say and nothing else, as committed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.config import TeacherConfig, differences, load, parse
from fewstep.evaluation.protocol import load_protocol
from fewstep.zoo import WORLDS

EVAL = Path(__file__).parents[2] / "eval"


def program(name):
    spec = importlib.util.spec_from_file_location(name, EVAL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


leaderboard, distill, headers = program("leaderboard"), program("distill"), program("headers")

PROTOCOL = {"name": "toy", "hash": "abc", "extractor_id": "features", "n": 2000}


def written(folder, name, rows, **cost):
    full = {"rows": rows, "protocol": PROTOCOL, "environment": {"cpu": "Toy CPU"}}
    (folder / f"{name}.json").write_text(json.dumps(full))
    (folder / f"{name}.summary.json").write_text(json.dumps(cost))


def student(fd, seed, **more):
    return {"model": "student", "steps": 2, "fd": fd, "seed": seed, **more}


def lines(page):
    """The table's rows as cells by column."""
    table = [x for x in page.splitlines() if x.startswith("| ") and not x.startswith(("| method", "| ---"))]
    return [dict(zip(leaderboard.COLUMNS, x.strip("| ").split(" | "), strict=True)) for x in table]


def test_the_command_runs_on_the_committed_results_and_the_committed_page_is_up_to_date(tmp_path):
    out, readme, ours = tmp_path / "page.md", tmp_path / "README.md", EVAL.parent / "README.md"
    readme.write_text(f"before\n{leaderboard.START}\nold\n{leaderboard.END}\nafter\n")
    command = [sys.executable, str(EVAL / "leaderboard.py"), "--out", str(out), "--readme", str(readme)]
    subprocess.run(command, check=True, capture_output=True)
    assert out.read_text() == (EVAL / "LEADERBOARD.md").read_text(), "run `python eval/leaderboard.py` and commit its page"
    table = readme.read_text().removeprefix(f"before\n{leaderboard.START}").removesuffix(f"{leaderboard.END}\nafter\n")
    assert f"{leaderboard.START}{table}{leaderboard.END}" in ours.read_text() and table.count("\n") > 10


def test_the_heads_of_the_configs_say_what_the_results_say():
    subprocess.run([sys.executable, str(EVAL / "headers.py"), "--check"], check=True, capture_output=True)


@pytest.mark.parametrize(
    "summary", [f for world in WORLDS for f in sorted((EVAL / "results").glob(f"{world}-*.summary.json"))], ids=lambda f: f.name
)
def test_what_was_measured_is_the_config_that_ships(summary):
    found = json.loads(summary.read_text())
    assert differences(parse(found["settings"]), load(EVAL.parent / found["config"])) == []


def test_a_head_keeps_its_authors_words_and_takes_the_numbers_in_place_of_older_ones(tmp_path):
    written(tmp_path, "a", [student(3.0, 0), student(5.0, 1), {"model": "teacher", "steps": 2, "fd": 9.0}])
    block = headers.said("a", tmp_path)
    assert (
        block.splitlines()[1] == "#           2 steps: FD 4.0 +- 1.4 (teacher: FD 9.0)"
        and "--seeds 0 1 " in block
        and "one core of Toy CPU;" in block
    )
    plain = "# Title\n# Note: mine\nteacher: {path: x}  # why\n"
    once = headers.head(plain, block)
    assert once == "# Title\n# Note: mine\n" + block + "teacher: {path: x}  # why\n" and headers.head(once, block) == once
    assert headers.head(once, "# Measured: not yet.\n") == plain.replace("teacher:", "# Measured: not yet.\nteacher:", 1)


def test_a_star_marks_the_steps_that_a_student_was_trained_for(tmp_path):
    settings = {
        "teacher": {"path": "zoo:sprites-sd"},
        "objective": {"name": "dmd", "steps": 2},
        "data": {"prompts": "zoo:sprites"},
    }
    written(tmp_path, "a", [student(3.0, 0), {**student(4.0, 0), "steps": 4}], settings=parse(settings).model_dump(mode="json"))
    assert [row["steps"] for row in lines(leaderboard.render(tmp_path))] == ["2*", "4"]


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path):
    costs = {"train_seconds": [10.0, 14.0], "train_cpu_seconds": [5.0, 7.0], "peak_gb": [1.0, 2.0]}
    costs["passes"] = {"student": 6.0, "student_backward": 1.0}
    rows = [
        student(10.0, 0, accuracy=0.5, recall=0.5, coverage=0.25, clip=30.0),
        student(14.0, 1, accuracy=0.5, recall=0.5, coverage=0.25, clip=30.0),
    ]
    written(tmp_path, "a", rows, teacher="zoo:x", **costs)
    (row,) = lines(leaderboard.render(tmp_path))
    assert row == {
        "method": "a",
        "steps": "2",
        "teacher": "zoo:x",
        "seeds": "2",
        "FD": "12.0 ± 2.8",
        "CLIP": "30.0 ± 0.0",
        "accuracy": "0.500 ± 0.000",
        "recall": "0.500 ± 0.000",
        "coverage": "0.250 ± 0.000",
        "train s": "12 ± 3",
        "CPU s": "6 ± 1",
        "peak GB": "1.50 ± 0.71",
        "passes a round": "student 6 (1)",
    }


def test_what_a_result_does_not_say_is_a_dash(tmp_path):
    written(tmp_path, "a", [{"model": "student", "steps": 1, "fd": 3.0}], peak_gb=[None], passes=None)
    (row,) = lines(leaderboard.render(tmp_path))
    assert {k for k, v in row.items() if v == "-"} == set(leaderboard.COLUMNS) - {"method", "steps", "FD"}


def test_teachers_stand_once_and_first_then_students_by_steps_and_distance(tmp_path):
    teacher = {"model": "teacher", "steps": 50, "fd": 1.0}
    written(tmp_path, "a", [teacher, student(9.0, 0)], teacher="zoo:x")
    written(tmp_path, "b", [teacher, student(10.0, 0), {**student(99.0, 0), "steps": 1}], teacher="zoo:x")
    (tmp_path / "bench.json").write_text('{"round_ms": 1}')
    found = [(row["method"], row["steps"]) for row in lines(leaderboard.render(tmp_path))]
    assert found == [("teacher", "50"), ("b", "1"), ("a", "2"), ("b", "2")]


def test_a_teachers_rows_are_taken_from_another_config_where_it_is_the_same_and_refused_elsewhere(tmp_path):
    rows = [{"model": "teacher", "steps": 2, "fd": 9.0}, student(3.0, 0)]
    mine = TeacherConfig(path="zoo:clouds-flow", guidance=1.5)
    place = tmp_path / "a.json"
    written(tmp_path, "a", rows, teacher=distill.named(mine))
    with pytest.raises(ValueError, match="not zoo:clouds-flow w=1.5 by sprites as it is now; leave --teacher out"):
        distill.teacher_rows(place, mine, "sprites")
    place.write_text(json.dumps({"rows": rows, "protocol": {"name": "sprites", "hash": load_protocol("sprites").hash}}))
    assert distill.teacher_rows(place, mine, "sprites") == rows[:1]
    with pytest.raises(ValueError, match="measured zoo:clouds-flow w=1.5 by .*, not zoo:clouds-flow w=1 by"):
        distill.teacher_rows(place, TeacherConfig(path="zoo:clouds-flow", guidance=1.0), "sprites")


def test_what_a_run_logged_becomes_its_costs():
    log = [
        {"round": 10, "seconds": 5.0, "cpu_seconds": 4.0, "peak_gb": 1.5, "passes/student": 6.0, "passes/student_backward": 1.0},
        {"round": 20, "seconds": 9.0, "cpu_seconds": 7.0, "peak_gb": 1.6, "passes/student": 8.0, "passes/student_backward": 1.0},
        {"round": 20, "pictures/contrast": 0.9},  # a preview's, without any of it
    ]
    assert distill.costs([log, [{"round": 1}]]) == {
        "train_seconds": [9.0, None],
        "train_cpu_seconds": [7.0, None],
        "peak_gb": [1.6, None],
        "passes": {"student": 7.0, "student_backward": 1.0},
    }
    assert distill.costs([[]])["passes"] is None


def test_a_file_with_rows_that_is_no_results_file_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"rows": [{"steps": 1}]}')
    with pytest.raises(ValueError, match="a.json"):
        leaderboard.render(tmp_path)


def test_the_costs_of_a_run_of_stages_are_those_of_all(tmp_path):
    tree = {"teacher": {"path": "x"}, "objective": {"name": "dmd"}, "data": {"prompts": "y"}, "stages": [{}, {}]}
    (tmp_path / "config.yaml").write_text(parse(tree).dump())
    for i in (1, 2):
        (tmp_path / f"stage-{i}").mkdir()
        lines = [{"round": k, "seconds": 2.0 * k, "cpu_seconds": 1.0 * k, "passes/student": i} for k in (1, 2)]
        (tmp_path / f"stage-{i}/metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    log = list(distill.chain(tmp_path))
    assert [(r["round"], r["seconds"], r["cpu_seconds"]) for r in log] == [(1, 2, 1), (2, 4, 2), (1, 6, 3), (2, 8, 4)]
    assert distill.costs([log])["train_seconds"] == [8.0]
