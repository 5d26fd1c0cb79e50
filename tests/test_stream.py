import subprocess
import sys

import pytest
import torch

from fewstep.stream import Stream, rows, stream


def numbers(rng):
    return rng.normal((4,)).tolist(), rng.uniform(4).tolist(), rng.integers(1000, 4).tolist(), rng.gaussian(4).tolist()


def test_the_same_place_in_a_run_draws_the_same_numbers():
    assert numbers(stream(1, 2, 3, 4)) == numbers(stream(1, 2, 3, 4))


def test_another_process_draws_the_same_numbers():
    code = "from fewstep.stream import stream; print(stream(1, 2, 3, 'x').normal((4,)).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(stream(1, 2, 3, "x").normal((4,)).tolist())


@pytest.mark.parametrize("other", [(9, 2, 3, 4), (1, 9, 3, 4), (1, 2, 9, 4), (1, 2, 3, 9), (2, 1, 3, 4)])
def test_any_other_place_draws_others(other):
    for a, b in zip(numbers(stream(1, 2, 3, 4)), numbers(stream(*other))):
        assert a != b


def test_what_was_drawn_before_does_not_matter_to_another_turn():
    used = stream(0, 0, 0, 0)
    used.normal((10,))
    torch.randn(3)
    assert numbers(stream(0, 0, 0, 1)) == numbers(stream(0, 0, 0, 1))
    assert used.normal((4,)).tolist() != stream(0, 0, 0, 0).normal((4,)).tolist()


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    numbers(stream(0, 0, 0, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_shared_stream_is_the_same_on_every_process_and_another_every_turn():
    drawn = [stream(0, rank, 5, 1).shared.uniform(4).tolist() for rank in range(3)]
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0] not in [stream(0, 0, 5, 2).shared.uniform(4).tolist(), stream(0, 0, 6, 1).shared.uniform(4).tolist()]
    assert drawn[0] != stream(0, 0, 5, 1).uniform(4).tolist()


def test_a_second_shared_draw_is_another_number():
    rng = stream(0, 0, 5, 1)
    assert rng.shared.uniform(1) != rng.shared.uniform(1)


def test_children_are_independent_of_their_parent_and_of_each_other():
    parent = stream(0, 0, 0, 0)
    fresh = numbers(parent.child("data"))
    parent.normal((100,))
    parent.uniform(3)
    assert numbers(parent.child("data")) == fresh
    assert numbers(parent.child("other")) != fresh
    assert numbers(stream(0, 0, 0, 0)) != fresh


def test_noise_and_indices_do_not_disturb_each_other():
    a, b = stream(0, 0, 0, 0), stream(0, 0, 0, 0)
    a.normal((7,))
    assert torch.equal(a.uniform(3), b.uniform(3))


def test_what_is_drawn_is_what_it_says():
    rng = stream(0, 0, 0, 0)
    u = rng.uniform(20_000)
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.015
    z = rng.normal((20_000,))
    assert z.dtype == torch.float32 and abs(z.mean()) < 0.04 and abs(z.std() - 1) < 0.03
    g = rng.gaussian(20_000)
    assert g.dtype == torch.float64 and abs(g.mean()) < 0.04 and abs(g.std() - 1) < 0.03
    assert set(rng.integers(3, 200).tolist()) == {0, 1, 2}
    assert {rng.integer(3) for _ in range(60)} == {0, 1, 2}
    like = rng.normal_like(torch.zeros(2, 3, dtype=torch.float64))
    assert like.shape == (2, 3) and like.dtype == torch.float64


def test_a_picture_of_a_seed_is_the_same_in_whatever_batch():
    whole, part = rows(3, 0, 5), rows(3, 2, 4)
    first, second = (r.normal((n, 2, 2)) for r, n in ((whole, 5), (part, 2)))
    assert torch.equal(first[2:4], second)
    assert torch.equal(whole.normal_like(first)[2:4], part.normal_like(second))
    assert len({row.flatten()[0].item() for row in first}) == 5
    assert not torch.equal(rows(4, 0, 5).normal((5, 2, 2)), first)


def test_a_stream_is_its_key():
    assert stream(1, 2, 3, 4) == Stream((1, 2, 3, 4))
