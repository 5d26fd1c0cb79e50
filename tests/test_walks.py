"""How students are deployed on their teachers, and at which times an objective asks its own."""

from itertools import pairwise

import pytest
from tiny import MAKERS, Made, save

from fewstep.adapters import load_teacher
from fewstep.config import parse
from fewstep.walks import nested, walk_of


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    def opened(name):
        make, size = MAKERS[name]
        return load_teacher(str(save(make(), tmp_path_factory.mktemp(name))), size=size)

    return Made(opened)


def walk(teacher, **objective):
    student = {"weights": "full"}
    tree = {"teacher": {"path": "somewhere"}, "student": student, "objective": objective, "data": {"images": "zoo:sprites"}}
    return walk_of(teacher, parse(tree))


@pytest.mark.parametrize("name", MAKERS)
def test_a_halved_student_is_taught_at_the_times_its_tutor_was_trained_at(name, teachers):
    """... that is, deployed at: of shifted flow models they are not halfway (FLUX.2's depend on their number, a little)."""
    for steps in (1, 2, 4):
        halved = walk(teachers[name], name="progressive", steps=steps)
        asked, known = halved.finer[2 * steps], walk(teachers[name], name="progressive", steps=2 * steps).grid
        assert asked[::2] == halved.grid
        assert asked == (known if "flux2" not in name and name != "klein" else pytest.approx(known, abs=0.01))


@pytest.mark.parametrize("name", ["sd", "sd3", "flux2"])
def test_shortcuts_of_one_step_know_the_times_of_several(name, teachers):
    parts = walk(teachers[name], name="shortcut", steps=1).finer[128]
    for steps in (1, 2, 4):
        if name != "flux2":
            assert parts[:: 128 // steps] == walk(teachers[name], name="shortcut", steps=steps).grid
    assert all(b < a for a, b in pairwise(parts)) and len(parts) == 128


def test_who_asks_its_teacher_anywhere_has_no_such_times(teachers):
    assert walk(teachers["sd"], name="consistency").finer == {}


def test_times_are_stretched_onto_the_steps_that_they_divide():
    assert nested((1.0, 0.9, 0.6, 0.3), (1.0, 0.6)) == (1.0, 0.9, 0.6, 0.3)
    assert nested((1.0, 0.9, 0.6, 0.3), (1.0, 0.5)) == pytest.approx((1.0, 0.875, 0.5, 0.25))
