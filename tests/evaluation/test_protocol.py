"""Protocols, the row they give, results.json, the report, timings."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.evaluation import protocol
from fewstep.evaluation.images import save_folder
from fewstep.evaluation.protocol import Protocol, floor, judge, load_prompts, load_protocol
from fewstep.evaluation.reference import load_reference, reference_images
from fewstep.zoo import HERE
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
        ("name: x\nreference: y\n", "n: field required"),
        ("name: x\nn: 9\n", "says no reference; give --reference FOLDER .your images. and --prompts FILE"),
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
    with pytest.raises(ValueError, match="there are clouds, inception, sprites, sprites-quick, or give a YAML file"):
        load_protocol("zzz")
    with pytest.raises(ValueError, match="no protocol file nowhere.yaml; write one with name, n, prompts and reference"):
        load_protocol("nowhere.yaml")


def test_those_shipped_are_valid_and_unlike():
    found = [load_protocol(f.stem, {"reference": "photos"}) for f in protocol.SHIPPED.glob("*.yaml")]
    assert {p.name for p in found} == {"clouds", "sprites", "sprites-quick", "inception"} and len({p.hash for p in found}) == 4


def test_hashes_are_those_of_results_that_were_measured_before():
    card = json.loads((HERE / "sprites-sd" / "results.json").read_text())["protocol"]
    assert load_protocol("sprites").hash == card["hash"]
    assert TINY.model_copy(update={"size": 64}).hash != TINY.hash


def test_your_own_images_need_a_reference_and_prompts_alone():
    with pytest.raises(
        ValueError, match="inception.yaml says no reference; give --reference FOLDER .your images. and --prompts FILE"
    ):
        load_protocol("inception")
    own = load_protocol("inception", {"reference": "photos", "prompts": "p.txt", "n": 9})
    assert (own.reference, own.prompts, own.n, own.extractor) == ("photos", "p.txt", 9, "inception")
    assert load_protocol("inception", {"reference": Path("photos"), "prompts": "p.txt", "n": 9}) == own
    assert load_protocol("sprites", {"reference": None, "n": None}) == load_protocol("sprites")
    with pytest.raises(ValueError, match="says no prompts to draw for; give --prompts FILE"):
        load_prompts(own.model_copy(update={"prompts": None}))


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
    mine = PLAIN.model_copy(update={"prompts": str(tmp_path / "p.txt")})
    assert load_prompts(mine) == [f"prompt {i}" for i in range(40)]
    with pytest.raises(ValueError, match="has 50 prompts.* a lower n .--n 50."):
        load_prompts(mine.model_copy(update={"n": 60}))
    with pytest.raises(ValueError, match="there is no file of prompts at nowhere.txt"):
        load_prompts(TINY.model_copy(update={"prompts": "nowhere.txt"}))


def test_prompts_may_be_the_captions_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (i, 99, 9)).save(tmp_path / f"photos/{i}.png")
        (tmp_path / f"photos/{i}.txt").write_text(f"photo {i}")
    mine = PLAIN.model_copy(update={"prompts": str(tmp_path / "photos"), "n": 8})
    assert load_prompts(mine) == [f"photo {i}" for i in range(8)]


def test_accuracy_wants_captions_and_pictures_of_the_zoo(tmp_path, zoo_clip):
    images, texts = draw(7, 40)
    (tmp_path / "p.txt").write_text("\n".join([*texts[:39], "a cat"]))
    with pytest.raises(ValueError, match="prompt 40 is 'a cat'; set accuracy: false in it, or: --protocol inception"):
        load_prompts(TINY.model_copy(update={"prompts": str(tmp_path / "p.txt")}))
    with pytest.raises(ValueError, match="pictures of 64x64 have, and these are 32x64; set accuracy: false"):
        judge(images[:, :, ::2], texts, TINY)


def test_pictures_without_prompts_have_no_scores_of_prompts(zoo_clip, quick_reader):
    images, texts = draw(7, 40)
    row, full = judge(images, None, TINY), judge(images, texts, TINY)
    assert full.keys() - row.keys() == {"clip", "accuracy", "accuracy_one"} and row.items() <= full.items()


def test_references_of_many_sizes_are_cut_to_one(zoo_clip, tmp_path):
    images, texts = draw(7, 40)
    for i in range(40):
        side = 64 + 8 * (i % 2)
        Image.fromarray(images[i]).resize((side, side + 8)).save(tmp_path / f"{i:02d}.png")
    mixed = PLAIN.model_copy(update={"reference": str(tmp_path)})
    with pytest.raises(ValueError, match="01.png is 72x80, 00.png 64x72; resize them alike .*size: 512"):
        judge(images, texts, mixed)
    assert judge(images, texts, mixed.model_copy(update={"size": 64}))["fd"] >= 0


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
    with pytest.raises(ValueError, match="only zoo:sprites, zoo:clouds can be drawn again"):
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
