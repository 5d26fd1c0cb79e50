"""KID and neighbour metrics against brute force (trap 19)."""

import numpy as np
import pytest

from fewstep.evaluation import neighbours
from fewstep.evaluation.kernel import kid, mmd
from fewstep.evaluation.neighbours import prdc


def normal(seed, n=50, d=4, offset=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) + offset


def brute_prdc(real, fake, k):
    def gap(a, b):
        return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))

    def radius(points, i):
        return sorted(gap(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    real_r = [radius(real, i) for i in range(len(real))]
    fake_r = [radius(fake, j) for j in range(len(fake))]
    inside = [[gap(real[i], fake[j]) < real_r[i] for j in range(len(fake))] for i in range(len(real))]
    return {
        "precision": np.mean([any(inside[i][j] for i in range(len(real))) for j in range(len(fake))]),
        "recall": np.mean([any(gap(real[i], fake[j]) < fake_r[j] for j in range(len(fake))) for i in range(len(real))]),
        "density": sum(map(sum, inside)) / k / len(fake),
        "coverage": np.mean([any(row) for row in inside]),
    }


def test_mmd_is_the_double_sum_without_the_diagonal():
    x, y = normal(0, 5, 3), normal(1, 7, 3)

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    xx = sum(kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    yy = sum(kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / 42
    xy = sum(kernel(a, b) for a in x for b in y) / 35
    assert mmd(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_kid_of_one_distribution_is_zero_on_average():
    rng = np.random.default_rng(0)
    values = [mmd(rng.normal(size=(100, 8)), rng.normal(size=(100, 8))) for _ in range(200)]
    error = np.std(values, ddof=1) / np.sqrt(200)
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < 0  # unbiased, so it must fall below zero half the time


def test_kid_error_bar_holds_what_it_promises():
    rng = np.random.default_rng(1)
    found = [kid(rng.normal(size=(200, 4)), rng.normal(size=(200, 4)), subsets=20) for _ in range(30)]
    assert np.mean([abs(mean) < 3 * error for mean, error in found]) > 0.9


def test_kid_of_two_distributions_is_many_errors_from_zero():
    mean, error = kid(normal(0, 200), normal(1, 200, offset=1.0), subsets=20)
    assert mean > 4 * error > 0


def test_kid_has_its_own_seed():
    x, y = normal(0, 100), normal(1, 100)
    np.random.seed(1)
    first = kid(x, y, subsets=5, seed=3)
    np.random.seed(2)
    assert kid(x, y, subsets=5, seed=3) == first != kid(x, y, subsets=5, seed=4)


@pytest.mark.parametrize("chunk", [2000, 7])
@pytest.mark.parametrize("k", [1, 5])
def test_prdc_is_brute_force(monkeypatch, chunk, k):
    monkeypatch.setattr(neighbours, "_CHUNK", chunk)
    real, fake = normal(0), normal(1, offset=0.5)
    assert prdc(real, fake, k=k) == pytest.approx(brute_prdc(real, fake, k), abs=1e-12)


@pytest.mark.parametrize("chunk", [2000, 7])
def test_prdc_is_brute_force_with_ties(monkeypatch, chunk):
    monkeypatch.setattr(neighbours, "_CHUNK", chunk)
    grid = np.stack(np.meshgrid(np.arange(15), np.arange(15)), -1).reshape(-1, 2).astype(float)
    rng = np.random.default_rng(0)
    real, fake = (grid[rng.choice(len(grid), 50, replace=False)] for _ in range(2))
    assert prdc(real, fake, k=5) == pytest.approx(brute_prdc(real, fake, 5), abs=1e-12)


def test_duplicates_count_once():
    real, few = normal(0, 40), normal(1, 20)
    found = prdc(real, np.concatenate([few, few]), k=5)
    assert found["recall"] > 0.3  # at radius zero it would vanish
    assert found == pytest.approx(brute_prdc(real, few, 5), abs=1e-12)


def test_repeated_samples_lose_coverage():
    real = normal(0, 400)
    assert prdc(real, normal(1, 400), k=5)["coverage"] > 0.9
    assert prdc(real, np.tile(normal(1, 20), (20, 1)), k=5)["coverage"] < 0.5


def test_density_may_exceed_one():
    real = normal(0, 200)
    found = prdc(real, 0.3 * normal(1, 200), k=5)
    assert found["density"] > 1.2 and found["recall"] < 0.5


def test_a_collapsed_generator_has_no_recall():
    assert prdc(normal(0), np.tile(normal(1, 3), (17, 1))[:50], k=5)["recall"] == 0


def test_unequal_counts_are_refused():
    with pytest.raises(ValueError, match="cut both to one N"):
        prdc(normal(0, 50), normal(1, 40))
    with pytest.raises(ValueError, match="distinct"):
        prdc(np.zeros((50, 4)), normal(1, 50))
    with pytest.raises(ValueError, match="8 samples"):
        kid(normal(0, 4), normal(1, 40))
