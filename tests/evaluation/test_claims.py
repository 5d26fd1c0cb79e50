"""What the leaderboard says of its aims follows the numbers, whichever way they fall."""

import json

import claims
import pytest

from fewstep.config import parse

PROTOCOL = {"name": "toy", "hash": "abc", "extractor_id": "features", "n": 2000}
TEACHER = {1: 1000.0, 4: 60.0, 50: 40.0}
GAN = {"name": "adversarial", "inner": {"name": "dmd", "steps": 1}}


@pytest.fixture
def measured(tmp_path):
    """measured(name, objective, FD of each seed, **measures, ...): a results file and its summary, where claims find them."""

    def write(name, objective, *fds, stages=(), teacher="zoo:a w=3", student=None, seconds=None, **measures):
        tree = {"teacher": {"path": "zoo:sprites-sd"}, "objective": objective, "data": {"images": "zoo:sprites"}}
        tree["student"] = student or {"weights": "lora"}
        config = parse(tree | ({"stages": list(stages)} if stages else {}))
        last = config.stages[-1] if stages else config
        kept = {"recall": 0.5, "coverage": 0.5, **measures}
        rows = [{"model": "teacher", "steps": n, "fd": fd, **kept} for n, fd in TEACHER.items()]
        rows += [{"model": "student", "steps": last.objective.steps, "seed": i, "fd": fd, **kept} for i, fd in enumerate(fds)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows, "protocol": PROTOCOL, "environment": {}}))
        cost = {"teacher": teacher, "settings": config.model_dump(mode="json"), "train_cpu_seconds": seconds}
        (tmp_path / f"{name}.summary.json").write_text(json.dumps(cost))
        return claims.students(tmp_path)

    return write


def test_half_of_the_teachers_distance_is_asked_at_the_students_own_steps(measured):
    alone = measured("a", {"name": "dmd", "steps": 1}, 400.0, 600.0)  # the mean is just half
    assert list(claims.near(alone)) == ["at most 1.3 times the teacher's FD in 50 steps, in 1 step: missed, a has 12.50"]
    measured("b", {"name": "dmd", "steps": 4}, 31.0)
    known = measured("c", {"name": "dmd", "steps": 4}, 20.0, stages=({"objective": {"steps": 4}}, {"objective": {"steps": 1}}))
    assert list(claims.halved(known)) == [
        "at most half of the teacher's FD in 1 step: 2 of 2 trained for it",
        "at most half of the teacher's FD in 4 steps: 0 of 1 trained for it; not b (0.52)",
    ]
    assert list(claims.near(known)) == [
        "at most 1.3 times the teacher's FD in 50 steps, in 1 step: held, c has 0.50",
        "at most 1.3 times the teacher's FD in 50 steps, in 4 steps: held, b has 0.78",
    ]


def test_one_file_for_all_steps_is_held_against_the_teacher_at_each(measured):
    stages = [{"objective": {"name": "tcd", "steps": 4, "segments": n}} for n in (4, 2)]
    stages.append({"objective": {"name": "dmd", "steps": 1}})
    measured("full", {"name": "tcd"}, 500.0, stages=stages, student={"weights": "full"})
    known = measured("one", {"name": "tcd"}, 500.0, stages=stages)
    assert list(claims.unified(known)) == ["one LoRA for all steps, one, times the teacher's FD there: 0.50 in 1 step"]


@pytest.mark.parametrize(
    ("seconds", "said"), [([700.0, 1260.0], "1 of 2; not b (21.0)"), ([60.0], "2 of 2; the longest 10.0, a")]
)
def test_training_that_takes_too_long_is_named(measured, seconds, said):
    measured("a", {"name": "dmd", "steps": 1}, 400.0, seconds=[600.0, None])
    measured("unknown", {"name": "dmd", "steps": 1}, 400.0)
    known = measured("b", {"name": "dmd", "steps": 1}, 400.0, seconds=seconds)
    assert list(claims.cheap(known)) == [f"at most 20 minutes of one processor: {said}"]


@pytest.mark.parametrize(("fd", "said"), [(39.0, "below"), (41.0, "not below")])
def test_real_data_take_a_student_past_its_teacher_or_do_not(measured, fd, said):
    measured("plain", {"name": "dmd", "steps": 1}, 1.0)
    (line,) = claims.real(measured("gan", GAN, fd))
    assert line == f"real data through heads, gan: {said} the teacher's 50 steps ({fd / 40:.2f} times its FD)"


@pytest.mark.parametrize(("recall", "said"), [(0.6, "recall 0.600 against 0.500 (more)"), (0.4, "0.400 against 0.500 (less)")])
def test_who_keeps_more_modes(measured, recall, said):
    measured("rkl", {"name": "f_distill", "steps": 1, "divergence": "rkl"}, 9.0)
    measured("other", {"name": "f_distill", "steps": 1, "divergence": "rkl"}, 9.0, teacher="zoo:b w=3")
    measured("dmd", {"name": "dmd", "steps": 4}, 20.0)
    measured("phased", {"name": "phased_dmd", "steps": 4}, 10.0, recall=recall)
    known = measured("kl", {"name": "f_distill", "steps": 1, "divergence": "kl"}, 9.0, recall=recall)
    (forward,), (phased,) = claims.forward(known), claims.phased(known)
    assert (
        forward.startswith("kl against rkl: ")
        and said in forward
        and "coverage 0.500 against 0.500 (no more than seeds differ); seeds: 1 and 1" in forward
    )
    assert phased.startswith("phased against dmd: FD 10.0 against 20.0, ") and said in phased


def test_what_seeds_alone_could_make_is_no_difference(measured, tmp_path):
    measured("kl", {"name": "f_distill", "steps": 1, "divergence": "kl"}, 9.0, recall=0.52)
    known = measured("rkl", {"name": "f_distill", "steps": 1, "divergence": "rkl"}, 8.0, 9.0)
    assert list(claims.forward(known[:1])) == ["forward against reverse KL: not measured on this teacher"]
    assert "(more)" in next(iter(claims.forward(known)))
    file = tmp_path / "rkl.json"
    found = json.loads(file.read_text())
    found["rows"][-1]["recall"] = 0.56  # the other has 0.5
    file.write_text(json.dumps(found))
    known = claims.students(tmp_path)
    assert "recall 0.520 against 0.530 (no more than seeds differ)" in next(iter(claims.forward(known)))
    assert list(claims.seeded(known)) == ["seeds of the nearest in 1 step: 2 (rkl), 1 (kl)"]


def test_each_teacher_has_its_own_and_who_does_not_say_how_it_was_trained_has_none(measured, tmp_path):
    measured("a", {"name": "dmd", "steps": 1}, 400.0)
    measured("b", {"name": "dmd", "steps": 1}, 600.0, teacher="zoo:b w=2")
    (tmp_path / "old.summary.json").write_text('{"config": "x.yaml"}')
    page = claims.page(tmp_path)
    assert [line for line in page if line.startswith("#")] == ["## What was aimed at\n", "### zoo:a\n", "### zoo:b\n"]
    assert [line for line in page if "half" in line] == [
        "- at most half of the teacher's FD in 1 step: 1 of 1 trained for it",
        "- at most half of the teacher's FD in 1 step: 0 of 1 trained for it; not b (0.60)",
    ]


def test_notes_are_whole_and_in_one_line(tmp_path):
    (tmp_path / "a.yaml").write_text("# Title\n# Note: one thing\n#       and another (#3).\n# Measured: not yet.\nteacher: {}\n")
    (tmp_path / "b.yaml").write_text("# Title\nteacher: {}\n")
    assert claims.notes(tmp_path)[1:] == ["- a: one thing and another (#3).", ""]
