"""Extractors and the CLIP score: state, batches, truncation (traps 13, 14, 17, 18; evaluation.md 1.4 f)."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from fewstep.evaluation.clip_score import ClipScore, tokenize
from fewstep.evaluation.features import (
    inception_features,
    module_features,
    open_clip_features,
    open_clip_model,
    resolve,
    weights_sha,
)
from fewstep.evaluation.frechet import Moments, frechet_distance

pytestmark = pytest.mark.filterwarnings("ignore:.*span less than")
WORDS = " ".join(f"{w} thing" for w in ("red", "blue", "green", "tall", "old", "new") * 20)


class Toy(torch.nn.Module):
    """State that a careless caller would disturb: batch norm, dropout, a matmul that autocast would round."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 4, 4),
            torch.nn.BatchNorm2d(4),
            torch.nn.Dropout(0.5),
            torch.nn.Flatten(),
            torch.nn.Linear(256, 5),
        )

    def forward(self, x):
        return self.body(x)


def test_features_do_not_depend_on_what_surrounds_the_call(images):
    toy = Toy()
    extractor = module_features(toy, "toy")
    before, state = extractor(images), {k: v.clone() for k, v in toy.state_dict().items()}
    toy.train()
    with torch.autocast("cpu", torch.bfloat16):
        after = extractor(images)
    np.testing.assert_array_equal(before, after)
    assert before.dtype == np.float32 and before.shape == (24, 5)
    assert all(torch.equal(v, state[k]) for k, v in toy.state_dict().items())


def test_no_graph_is_built(images):
    seen = []

    class Spy(Toy):
        def forward(self, x):
            seen.append(super().forward(x))
            return seen[-1]

    module_features(Spy(), "spy")(images)
    assert not seen[0].requires_grad


@pytest.mark.parametrize("batch", [1, 5, 24])
def test_batch_size_does_not_matter(images, clip_folder, batch):
    whole, parts = (open_clip_features(clip_folder, batch=b)(images) for b in (64, batch))
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    other = Moments.of(open_clip_features(clip_folder)(images[::-1] // 2))
    a, b = (frechet_distance(Moments.of(x), other) for x in (whole, parts))
    assert b == pytest.approx(a, rel=1e-5)


def test_the_id_names_the_weights(clip_folder, make_clip, tmp_path):
    other = open_clip_features(make_clip(tmp_path / "tiny-clip", seed=1)).id
    mine = open_clip_features(clip_folder).id
    assert mine != other and mine.split(":")[1] == other.split(":")[1] == "tiny-clip" and "bicubic" in mine
    assert len(weights_sha(Toy())) == 12 and weights_sha(Toy()) != weights_sha(Toy())
    torch.manual_seed(3)
    first = Toy()
    torch.manual_seed(3)
    assert weights_sha(first) == weights_sha(Toy())


def test_image_features_are_those_of_open_clip(images, clip_folder):
    import open_clip
    from PIL import Image

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    with torch.no_grad():
        expected = model.eval().encode_image(torch.stack([preprocess(Image.fromarray(i)) for i in images])).numpy()
    found = open_clip_features(clip_folder)(images)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.ptp(np.linalg.norm(found, axis=1)) > 1e-4  # unnormalised


def test_channel_order_matters(images, clip_folder):
    extractor = open_clip_features(clip_folder)
    assert np.abs(extractor(images) - extractor(images[..., ::-1])).max() > 1e-3


def test_a_wrong_range_never_reaches_the_network(images, clip_folder):
    with pytest.raises(ValueError, match="to_uint8"):
        open_clip_features(clip_folder)(images / 255.0)
    with pytest.raises(ValueError, match="no pixel exceeds 1"):
        open_clip_features(clip_folder)((images // 128).astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("inception:", "weights file"),
        ("inception:/nowhere.pth", "no Inception weights file"),
        ("open_clip:ViT-B-32", "needs weights"),
        ("open_clip:ViT-B-32:/nowhere.safetensors", "neither a file nor a weights tag"),
        ("open_clip:ViT-B-33:x", "neither a folder nor an architecture"),
        ("vgg", "names no extractor"),
        ("zoo:nothing", "the zoo has no"),
    ],
)
def test_a_name_that_cannot_be_had_offline_is_refused(name, says):
    with pytest.raises(ValueError, match=says):
        resolve(name)


def test_a_folder_without_weights_is_refused(clip_folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((clip_folder / "open_clip_config.json").read_text())
    with pytest.raises(ValueError, match="holds no weights"):
        open_clip_features(tmp_path)


def test_inception_is_found_where_torch_fidelity_keeps_it(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=f"put https://.*pth into {tmp_path}/checkpoints, or name it"):
        resolve("inception")
    (tmp_path / "checkpoints").mkdir()
    random = inception_features(None, random=True)
    torch.save(random.module.state_dict(), tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth")
    assert resolve("inception").id == random.id.replace("-random", "")


def test_inception_runs_from_a_file_without_unpickling_code(tmp_path):
    pytest.importorskip("torch_fidelity")
    few = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    random = inception_features(None, random=True)
    torch.save(random.module.state_dict(), tmp_path / "w.pth")
    loaded = resolve(f"inception:{tmp_path}/w.pth")
    assert loaded.id == random.id.replace("-random", "") and loaded.id.startswith("inception-tf1:")
    found = loaded(few)
    assert found.shape == (2, 2048)
    np.testing.assert_array_equal(found, random(few))

    class Evil:
        def __reduce__(self):
            return (print, ("unpickled",))

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match="(?i)weights.only"):
        inception_features(tmp_path / "evil.pth")


def test_scores_are_a_hundred_cosines_in_any_batch(images, clip_folder):
    prompts = [f"a {c} thing {i % 5}" for i, c in enumerate(("red", "green", "blue") * 8)]
    clip = open_clip_model(str(clip_folder))
    with torch.no_grad():
        a, b = clip.model.encode_image(clip.prepare(images)), clip.model.encode_text(clip.tokenizer(prompts))
    expected = 100 * torch.nn.functional.cosine_similarity(a, b).numpy()
    for batch in (7, 64):
        np.testing.assert_allclose(ClipScore(clip_folder, batch=batch).score(images, prompts), expected, atol=1e-3)


def test_scores_follow_their_pairs(images, clip_folder):
    prompts = [f"thing {i}" for i in range(24)]
    scorer, order = ClipScore(clip_folder), np.random.default_rng(0).permutation(24)
    paired = scorer.score(images, prompts)
    np.testing.assert_allclose(scorer.score(images[order], [prompts[i] for i in order]), paired[order], atol=1e-4)
    assert np.abs(scorer.score(images, [prompts[i] for i in order]) - paired).max() > 1e-2
    with pytest.raises(ValueError, match="23 prompts"):
        scorer.score(images, prompts[1:])


def test_truncation_keeps_the_end_of_text(images, clip_folder):
    clip = open_clip_model(str(clip_folder))
    ids = clip.tokenizer.encode(WORDS)
    assert len(ids) > 100
    fits = clip.tokenizer.decode(ids[:10])  # 12 places: start, ten words, end
    scorer = ClipScore(clip_folder)
    np.testing.assert_allclose(scorer.score(images, [WORDS] * 24), scorer.score(images, [fits] * 24), atol=1e-4)
    assert "keep-eot" in scorer.id


def test_a_tokenizer_that_cuts_the_end_off_is_mended():
    class Cutting:
        eot_token_id = 9

        def __call__(self, texts):
            rows = [([1, *map(len, t.split()), 9] + [0] * 6)[:6] for t in texts]
            return torch.tensor(rows)

    found = tokenize(Cutting(), ["aa bb", "aa bb cc dd ee ff gg"])
    assert found.tolist() == [[1, 2, 2, 9, 0, 0], [1, 2, 2, 2, 2, 9]]


def test_the_judge_needs_no_heavy_package_to_load_and_no_scipy_to_compute():
    script = """if True:
        import sys
        sys.modules["scipy"] = None
        import numpy as np
        from fewstep.evaluation import latency, protocol, report, results
        from fewstep.evaluation.frechet import Moments, frechet_distance
        x = Moments.of(np.random.default_rng(0).normal(size=(9, 2)))
        assert frechet_distance(x, x) < 1e-8
        print({"open_clip", "torch_fidelity", "matplotlib", "diffusers", "transformers"} & set(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr[-500:]
