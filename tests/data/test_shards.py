import gzip
import io
import json
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from fewstep.data import read_images

SIZE = (8, 8)


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def png(i):
    raw = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(raw, "png")
    return raw.getvalue()


def shard(file, members):
    """Writes a tar of (name, content) and gives its path."""
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def sample(key, i, caption):
    return [(f"{key}.png", png(i)), (f"{key}.txt", caption.encode())]


def test_captions_are_members_of_the_images_key(tmp_path):
    members = [
        ("./deep/a.v1.cls", b"7"),
        ("./deep/a.PNG", png(0)),
        ("./deep/a.txt", b"  un\n\xc3\xa9t\xc3\xa9 "),
        ("b.json", json.dumps({"width": 8, "caption": "second", "prompt": None}).encode()),
        ("b.png", png(1)),
        ("b.mask.png", b"another file of the sample"),
        ("only.txt", b"no image"),
        ("deep/._a.png", b"a resource fork"),
    ]
    found = read_images(str(shard(tmp_path / "a.tar", members)), SIZE)
    assert found.captions == ("un été", "second")
    assert [str(f) for f in found.files] == [f"./deep/a.PNG in {tmp_path}/a.tar", f"b.png in {tmp_path}/a.tar"]


def test_shards_and_a_folder_of_the_same_images_are_one_set(tmp_path):
    """So their encodings are made once."""
    (tmp_path / "loose").mkdir()
    (tmp_path / "shards").mkdir()
    for i in range(4):
        (tmp_path / f"loose/{i}.png").write_bytes(png(i))
        (tmp_path / f"loose/{i}.txt").write_text(f"caption {i}")
    for k in (1, 0):
        shard(tmp_path / f"shards/{k}.tar", [m for i in (2 * k, 2 * k + 1) for m in sample(f"x{i}", i, f"caption {i}")])
    loose, shards = (read_images(str(tmp_path / name), SIZE) for name in ("loose", "shards"))
    assert (shards.captions, shards.digest) == (loose.captions, loose.digest)
    np.testing.assert_array_equal(shards.load([3, 0, 2], SIZE), loose.load([3, 0, 2], SIZE))
    assert read_images(str(tmp_path / "shards" / "*.tar"), SIZE) == shards
    assert read_images(str(tmp_path / "shards" / "1.tar"), SIZE).captions == ("caption 2", "caption 3")


def test_damaged_images_in_shards_are_left_out_counted_and_named(tmp_path):
    bad = [("b.png", png(1)[:-60]), ("b.txt", b"second"), ("c.png", b""), ("c.txt", b"third")]
    file = shard(tmp_path / "a.tar", sample("a", 0, "first") + bad + sample("d", 3, "fourth"))
    says = "2 of the 4 images in .* cannot be read and are left out .first: b.png in .*a.tar, c.png in .*a.tar"
    with pytest.warns(UserWarning, match=says):
        found = read_images(str(file), SIZE)
    assert found.captions == ("first", "fourth")
    assert found.load([0, 1], SIZE).shape == (2, 8, 8, 3)


def test_nothing_outside_a_shard_is_read_or_written(tmp_path):
    """Links are not followed, and names that climb out are only names."""
    (tmp_path / "secret.png").write_bytes(png(5))
    (tmp_path / "in").mkdir()
    file = shard(tmp_path / "in/a.tar", sample("a", 0, "first"))
    with tarfile.open(file, "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "b.png"), (tarfile.LNKTYPE, "c.png"), (tarfile.CHRTYPE, "d.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(info)
        info = tarfile.TarInfo("../e.png")
        info.size = len(png(4))
        tar.addfile(info, io.BytesIO(png(4)))
    assert read_images(str(file), SIZE, captioned=False).captions == ("first",)
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["a.tar", "in", "secret.png"]


def test_a_shard_that_is_not_whole_is_refused(tmp_path):
    file = shard(tmp_path / "a.tar", [m for i in range(3) for m in sample(f"x{i}", i, "words")])
    raw = file.read_bytes()
    second = raw.index(b"x1.png")
    mangled = raw[:second] + b"y" + raw[second + 1 :]  # the header's checksum no longer fits
    for content in (gzip.compress(raw), b"no tar", b"", raw[: second + 600], raw[: second + 100], mangled):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="a.tar is not a whole plain tar .*; copy it again, or decompress it"):
            read_images(str(file), SIZE)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        (
            [("a.png", png(0)), *sample("b", 1, "x")],
            "1 of the 2 images in .* no caption .first: a.png in .*; add a .txt of the same",
        ),
        ([("a.png", png(0)), ("a.json", b'{"width": 8}')], "1 of the 1 images in .* have no caption"),
        ([("a.png", png(0)), ("a.json", b"[1]")], "a.json in .*a.tar is not an object; write"),
        ([("a.png", png(0)), ("a.json", b"{")], "a.json in .*a.tar is not JSON .*; write one object"),
        ([("a.png", png(0)), ("a.json", b'{"text": 3}')], "a.json in .*a.tar: 'text' is 3, which is no text"),
        ([("a.png", png(0)), ("a.txt", b"caf\xe9")], "a.txt in .*a.tar is not UTF-8 .byte 3, line 1.; save it as UTF-8"),
        ([*sample("a", 0, "x"), ("a.jpg", png(1))], "a.jpg in .* has the key of a.png; give every image a key of its own"),
        ([("a.txt", b"x")], "a.tar holds no images"),
    ],
)
def test_what_is_wrong_with_a_sample_is_said_with_its_name(tmp_path, members, says):
    with pytest.raises(ValueError, match=says):
        read_images(str(shard(tmp_path / "a.tar", members)), SIZE)


def test_without_need_of_captions_none_are_asked_for(tmp_path):
    file = shard(tmp_path / "a.tar", [("a.png", png(0)), ("a.json", b'{"width": 8}'), ("b.png", png(1))])
    assert read_images(str(file), SIZE, captioned=False).captions == ("", "")


def test_a_folder_of_several_kinds_is_not_guessed_at(tmp_path):
    (tmp_path / "teaser.png").write_bytes(png(0))
    shard(tmp_path / "a.tar", sample("a", 0, "x"))
    with pytest.raises(ValueError, match="holds 1 images, 1 .tar and 0 .parquet files; say which"):
        read_images(str(tmp_path), SIZE)
    with pytest.raises(ValueError, match="no images at .*b.*.tar; give a folder"):
        read_images(str(tmp_path / "b*.tar"), SIZE)


def test_the_order_of_a_pattern_is_that_of_the_names(tmp_path, monkeypatch):
    """Not the file system's, which would make other sets of the same shards."""
    for name in "ba":
        shard(tmp_path / f"{name}.tar", sample(name, 0, name))
    monkeypatch.setattr("fewstep.data.images.glob", lambda *_, **__: [f"{tmp_path}/b.tar", f"{tmp_path}/a.tar"])
    assert read_images(str(tmp_path / "*.tar"), SIZE).captions == ("a", "b")


def test_a_shard_damaged_later_is_named(tmp_path):
    file = shard(tmp_path / "a.tar", sample("a", 0, "x"))
    found = read_images(str(file), SIZE)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="a.png in .*a.tar can no longer be read .*; start again"):
        found.load([0], SIZE)
