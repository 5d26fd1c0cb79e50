"""The Frechet distance against closed forms, other libraries and its own symmetries (evaluation.md 1.4, traps 3 to 7, 10)."""

import numpy as np
import pytest
import torch

from fewstep.evaluation.frechet import Moments, frechet_distance

pytestmark = pytest.mark.filterwarnings("ignore:.*span less than")


def normal(seed, n=400, d=6, spread=1.0, offset=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ (np.eye(d) * spread + 0.2 * rng.normal(size=(d, d))) + offset


def fd(x, y):
    return frechet_distance(Moments.of(x), Moments.of(y))


def test_diagonal_gaussians_have_their_closed_form():
    rng = np.random.default_rng(0)
    a, b, mean = rng.uniform(0.1, 4, 32), rng.uniform(0.1, 4, 32), rng.normal(size=32)
    expected = (mean**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(Moments.known(np.zeros(32), np.diag(a)), Moments.known(mean, np.diag(b)))
    assert found == pytest.approx(expected, rel=1e-10)


def test_covariances_that_do_not_commute():
    a, b = np.array([[2.0, 1.0], [1.0, 1.0]]), np.array([[1.0, -0.5], [-0.5, 3.0]])
    # in 2-D: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), M = a b
    m = a @ b
    expected = np.trace(a) + np.trace(b) - 2 * np.sqrt(np.trace(m) + 2 * np.sqrt(np.linalg.det(m)))
    zero = np.zeros(2)
    assert frechet_distance(Moments.known(zero, a), Moments.known(zero, b)) == pytest.approx(expected, rel=1e-12)
    assert np.abs(np.linalg.eigvalsh(m) - np.linalg.eigvals(m)).max() > 0.1  # the shortcut this guards against would differ


def test_agrees_with_torch_fidelity():
    metric = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = normal(0), normal(1, spread=1.3, offset=0.3)
    stats = [{"mu": z.mean(0), "sigma": np.cov(z.T)} for z in (x, y)]
    expected = next(iter(metric.fid_statistics_to_metric(*stats, verbose=False).values()))
    assert fd(x, y) == pytest.approx(expected, rel=1e-6)


def test_agrees_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1).double()

    x, y = (np.random.default_rng(s).integers(0, top, (200, 3, 2, 2)).astype(np.uint8) for s, top in ((0, 256), (1, 200)))
    metric = FrechetInceptionDistance(feature=Identity(), input_img_size=(3, 2, 2), normalize=False).set_dtype(torch.float64)
    metric.update(torch.from_numpy(x), real=True)
    metric.update(torch.from_numpy(y), real=False)
    assert fd(x.reshape(200, -1), y.reshape(200, -1)) == pytest.approx(float(metric.compute()), rel=1e-5)


def test_a_constant_added_to_all_features_changes_nothing():
    x, y = normal(0), normal(1)
    for offset in (1e2, 1e5):
        assert fd(x + offset, y + offset) == pytest.approx(fd(x, y), rel=1e-6)


def test_two_samples_have_the_unbiased_covariance():
    moments = Moments.of(np.array([[0.0, 0.0], [2.0, 4.0]]))
    np.testing.assert_allclose(moments.mean, [1, 2])
    np.testing.assert_allclose(moments.cov, [[2, 4], [4, 8]])


@pytest.mark.parametrize("sizes", [(400,), (1, 399), (7,) * 57 + (1,), (200, 200)])
def test_batches_do_not_matter(sizes):
    x = normal(0, offset=50) * 3
    streamed = Moments.of(x[: sizes[0]])
    for end, size in zip(np.cumsum(sizes)[1:], sizes[1:], strict=True):
        streamed = streamed.update(x[end - size : end])
    assert streamed.n == 400
    np.testing.assert_allclose(streamed.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(streamed.cov, np.cov(x.T), rtol=1e-9)


def test_merged_parts_are_the_whole():
    x = normal(0, offset=50)
    merged = Moments.of(x[:7]).merge(Moments.of(x[7:150]).update(x[150:300])).merge(Moments.of(x[300:]))
    assert merged.n == 400
    np.testing.assert_allclose(merged.cov, np.cov(x.T), rtol=1e-9)
    assert frechet_distance(merged, Moments.of(normal(1))) == pytest.approx(fd(x, normal(1)), rel=1e-9)


def test_a_rotation_of_all_features_changes_nothing():
    x, y = normal(0), normal(1, spread=1.2, offset=0.4)
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))
    assert fd(x @ turn, y @ turn) == pytest.approx(fd(x, y), rel=1e-9)


def test_the_order_of_samples_does_not_matter():
    x, y = normal(0), normal(1, offset=0.4)
    order = np.random.default_rng(3).permutation(len(x))
    assert fd(x[order], y) == pytest.approx(fd(x, y), rel=1e-12)


def test_a_set_is_at_no_distance_from_itself():
    assert 0 <= fd(normal(0), normal(0)) <= 1e-8


def test_the_distance_is_symmetric():
    x, y = normal(0), normal(1, spread=1.5, offset=0.2)
    assert fd(x, y) == pytest.approx(fd(y, x), rel=1e-9)


@pytest.mark.filterwarnings("default:.*span less than")
def test_fewer_samples_than_dimensions_warn_and_match_the_nuclear_norm():
    x, y = normal(0, n=20, d=64), normal(1, n=30, d=64)
    xc, yc = x - x.mean(0), y - y.mean(0)
    overlap = np.linalg.norm(xc @ yc.T, "nuc") / np.sqrt(19 * 29)
    traces = (xc**2).sum() / 19 + (yc**2).sum() / 29
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + traces - 2 * overlap
    with pytest.warns(UserWarning, match="20 samples span less than the 64"):
        assert fd(x, y) == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_enough_samples_do_not_warn():
    fd(normal(0), normal(1))


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples"):
        fd(normal(0, n=1), normal(1))


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        Moments.of(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(Moments.known(np.zeros(2), np.full((2, 2), np.nan)), Moments.known(np.zeros(2), np.eye(2)))


def test_a_matrix_that_is_no_covariance_is_refused():
    bad = Moments.known(np.zeros(2), np.diag([1.0, -3.0]))
    with pytest.raises(ValueError, match="not positive semi-definite"):
        frechet_distance(bad, Moments.known(np.zeros(2), np.diag([4.0, 0.1])))


def test_moments_survive_the_disk(tmp_path):
    made = Moments.of(normal(0), extractor="net:abc:tf1", source="f00d")
    made.save(tmp_path / "m.npz")
    back = Moments.load(tmp_path / "m.npz", extractor="net:abc:tf1")
    assert (back.n, back.extractor, back.source) == (400, "net:abc:tf1", "f00d")
    assert frechet_distance(made, back) <= 1e-12
    more = normal(5, offset=1)
    np.testing.assert_allclose(back.update(more).cov, np.cov(np.concatenate([normal(0), more]).T), rtol=1e-9)
    assert [f.name for f in tmp_path.iterdir()] == ["m.npz"]


def test_moments_of_another_extractor_are_refused(tmp_path):
    Moments.of(normal(0), extractor="net:abc:tf1").save(tmp_path / "m.npz")
    with pytest.raises(ValueError, match=r"made with net:abc:tf1, not with net:abc:clean; .*compute"):
        Moments.load(tmp_path / "m.npz", extractor="net:abc:clean")
    with pytest.raises(ValueError, match="do not compare"):
        frechet_distance(Moments.of(normal(0), extractor="a"), Moments.of(normal(1), extractor="b"))
    with pytest.raises(ValueError, match="do not compare"):
        Moments.of(normal(0), extractor="a").merge(Moments.of(normal(1), extractor="b"))


def test_a_foreign_file_is_taken_with_a_warning(tmp_path):
    x = normal(0)
    np.savez(tmp_path / "foreign.npz", mu=x.mean(0), sigma=np.cov(x.T))
    with pytest.warns(UserWarning, match="does not say which extractor"):
        foreign = Moments.load(tmp_path / "foreign.npz", extractor="net:abc:tf1")
    assert (foreign.extractor, foreign.n) == ("unknown", None)
    assert frechet_distance(foreign, Moments.of(x, extractor="net:abc:tf1")) <= 1e-12
    with pytest.raises(ValueError, match="cannot be merged"):
        foreign.merge(foreign)


def test_moments_that_are_damaged_or_gone_are_called_so(tmp_path):
    with pytest.raises(ValueError, match="there are no reference moments at .*gone.npz; correct the path"):
        Moments.load(tmp_path / "gone.npz")
    Moments.of(normal(0), extractor="net").save(tmp_path / "m.npz")
    whole = (tmp_path / "m.npz").read_bytes()
    for wound in (b"text", whole[: len(whole) // 2], whole[:150] + bytes(100) + whole[250:]):
        (tmp_path / "m.npz").write_bytes(wound)
        with pytest.raises(ValueError, match="m.npz is damaged; make it again with np.savez"):
            Moments.load(tmp_path / "m.npz")


def test_a_pickle_is_never_opened(tmp_path):
    np.savez(tmp_path / "evil.npz", mu=np.array([object()], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="pickled objects"):
        Moments.load(tmp_path / "evil.npz")
    (tmp_path / "ref.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="a pickle is never opened"):
        Moments.load(tmp_path / "ref.pkl")
