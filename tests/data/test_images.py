import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.data import images as module
from fewstep.data import read_images
from fewstep.zoo import sprites

SIZE = (8, 8)
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def put(folder, name, picture=None, caption="a thing"):
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    (picture or Image.new("RGB", (8, 8), RED)).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption)
    return file


def only(folder, resolution=SIZE):
    """The one picture of a folder (h, w, 3)."""
    return read_images(str(folder), resolution).load([0], resolution)[0]


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_captions_lie_beside_the_images_or_in_one_file(tmp_path):
    put(tmp_path, "b.png", caption="  un\nété ")
    put(tmp_path, "a.jpg", caption=None)
    put(tmp_path, "deep/c.webp", caption=None)
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.jpg", "text": "first"}\n{"file_name": "deep/c.webp", "text": "third"}\n'
    )
    found = read_images(str(tmp_path), SIZE)
    assert [f.name for f in found.files] == ["a.jpg", "b.png", "c.webp"]
    assert found.captions == ("first", "un été", "third")
    assert len(found) == 3


def test_hidden_files_and_other_files_are_not_images(tmp_path):
    put(tmp_path, "a.png")
    put(tmp_path, "._a.png", caption=None)
    put(tmp_path, ".thumbnails/a.png", caption=None)
    (tmp_path / "notes.md").write_text("hello")
    assert len(read_images(str(tmp_path), SIZE)) == 1


def test_images_that_are_not_read_and_lines_without_one_are_counted(tmp_path):
    for name in ("b.gif", "deep/c.bmp", "d.tiff"):
        put(tmp_path, name, caption=None)
    with pytest.raises(ValueError, match="3 files of .* are no PNG, JPEG or WebP .b.gif.; save them as PNG"):
        read_images(str(tmp_path), SIZE)
    put(tmp_path, "a.png", caption=None)
    lines = [f'{{"file_name": "{name}", "text": "a thing"}}\n' for name in ("a.png", "b.gif", "e.png", "f.png")]
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    with pytest.warns(UserWarning) as said:
        assert read_images(str(tmp_path), SIZE).captions == ("a thing",)
    first, second = (str(one.message) for one in said)
    assert "3 files of" in first and "are left out; save them as PNG to have them read" in first
    assert "2 of the 4 files that" in second and "are not there (first: e.png) and are left out" in second


def test_a_picture_of_the_right_size_keeps_its_pixels(tmp_path):
    put(tmp_path, "a.png", Image.fromarray(noise(8, 12)))
    np.testing.assert_array_equal(only(tmp_path, (8, 12)), noise(8, 12))


def test_load_gives_the_rows_that_were_asked_for(tmp_path):
    for i in range(3):
        put(tmp_path, f"{i}.png", Image.new("RGB", (8, 8), (i, 0, 0)))
    loaded = read_images(str(tmp_path), SIZE).load([2, 0, 2], SIZE)
    assert (loaded.dtype, loaded.shape) == (np.uint8, (3, 8, 8, 3))
    assert loaded[:, 0, 0, 0].tolist() == [2, 0, 2]


def test_the_centre_is_cut_out_and_the_rest_dropped(tmp_path):
    wide, tall = noise(8, 24), noise(24, 8)
    put(tmp_path, "a.png", Image.fromarray(wide))
    put(tmp_path, "b.png", Image.fromarray(tall))
    loaded = read_images(str(tmp_path), SIZE).load([0, 1], SIZE)
    np.testing.assert_array_equal(loaded[0], wide[:, 8:16])
    np.testing.assert_array_equal(loaded[1], tall[8:16])


def test_resizing_is_lanczos(tmp_path):
    picture = Image.fromarray(noise(24, 24))
    put(tmp_path, "a.png", picture)
    np.testing.assert_array_equal(only(tmp_path), np.asarray(picture.resize((8, 8), Image.Resampling.LANCZOS)))


def test_resolution_is_height_then_width(tmp_path):
    put(tmp_path, "a.png", Image.fromarray(noise(32, 32)))
    assert only(tmp_path, (8, 16)).shape == (8, 16, 3)


def test_a_camera_held_upright_gives_an_upright_picture(tmp_path):
    halves = np.zeros((8, 8, 3), np.uint8)
    halves[:, :4], halves[:, 4:] = RED, BLUE
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the left becomes the top
    (tmp_path / "a.txt").write_text("halves")
    Image.fromarray(halves).save(tmp_path / "a.png", exif=exif)
    shown = only(tmp_path)
    assert (shown[:4] == RED).all()
    assert (shown[4:] == BLUE).all()


def test_transparency_becomes_white(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[:4, :, 3] = 255
    put(tmp_path, "a.png", Image.fromarray(pixels))
    shown = only(tmp_path)
    assert (shown[:4] == RED).all()
    assert (shown[4:] == WHITE).all()


def test_a_transparent_palette_colour_becomes_white(tmp_path):
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([*GREEN, *RED])
    picture.paste(0, (0, 0, 8, 4))
    (tmp_path / "a.txt").write_text("halves")
    picture.save(tmp_path / "a.png", transparency=0)
    shown = only(tmp_path)
    assert (shown[:4] == WHITE).all()
    assert (shown[4:] == RED).all()


def test_grey_becomes_three_channels_and_16_bits_become_8(tmp_path):
    put(tmp_path, "a.png", Image.new("L", (8, 8), 200))
    put(tmp_path, "b.png", Image.fromarray(np.full((8, 8), 200 * 257, np.uint16)))
    loaded = read_images(str(tmp_path), SIZE).load([0, 1], SIZE)
    assert loaded.shape == (2, 8, 8, 3)
    assert (loaded == 200).all()


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-200])


@pytest.mark.parametrize("damage", [cut_short, lambda f: f.write_bytes(b"not an image"), lambda f: f.write_bytes(b"")])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_images_are_left_out_with_one_warning(tmp_path, damage, suffix):
    for name in "abcd":
        put(tmp_path, f"{name}.{suffix}", Image.fromarray(noise(32, 32)), caption=name)
    for name in "bc":
        damage(tmp_path / f"{name}.{suffix}")
    with pytest.warns(UserWarning) as seen:
        found = read_images(str(tmp_path), SIZE)
    (warning,) = seen
    assert "2 of the 4 images" in str(warning.message)
    assert f"b.{suffix}, {tmp_path}/c.{suffix}); save them again or delete them" in str(warning.message)
    assert found.captions == ("a", "d")
    assert found.load([1], SIZE).shape == (1, 8, 8, 3)


def test_the_first_damaged_images_are_named_and_all_are_counted(tmp_path):
    for i in range(10):
        put(tmp_path, f"{i}.png")
    for i in range(2, 7):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    with pytest.warns(UserWarning, match=r"5 of the 10 images .* \(first: .*2.png, .*3.png, .*4.png\); save") as seen:
        assert len(read_images(str(tmp_path), SIZE)) == 5
    assert "5.png" not in str(seen[0].message)


def test_more_damaged_images_than_whole_ones_are_an_error(tmp_path):
    for name in "abc":
        put(tmp_path, f"{name}.png")
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no")
    with pytest.raises(
        ValueError, match="2 of the 3 images in .* cannot be read .*a.png, .*b.png.: more than half, .*; save them again as PNG"
    ):
        read_images(str(tmp_path), SIZE)


def test_metadata_that_make_no_sense_are_damage_and_not_the_end_of_the_run(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "abc"
    text, number = (bytes.fromhex(f"010e {kind:04x} {count:08x}") for kind, count in ((2, 4), (11, 1)))
    put(tmp_path, "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg", exif=exif.tobytes().replace(text, number))
    (tmp_path / "b.txt").write_text("words")
    with pytest.warns(UserWarning, match="1 of the 2 images .*b.jpg"):
        assert len(read_images(str(tmp_path), SIZE)) == 1


def test_an_image_damaged_later_is_named(tmp_path):
    file = put(tmp_path, "a.png")
    found = read_images(str(tmp_path), SIZE)
    file.write_bytes(b"no")
    with pytest.raises(ValueError, match="a.png can no longer be read .*; start again"):
        found.load([0], SIZE)


def test_small_images_are_enlarged_with_a_warning(tmp_path):
    put(tmp_path, "a.png", Image.new("RGB", (64, 64)))
    put(tmp_path, "b.png", Image.new("RGB", (64, 16)))
    with pytest.warns(UserWarning, match="1 of the 2 images .* smaller than 32x64 and are enlarged .*b.png.; larger ones"):
        found = read_images(str(tmp_path), (32, 64))
    assert found.load([1], (32, 64)).shape == (1, 32, 64, 3)


def test_images_without_a_caption_are_counted_and_the_first_named(tmp_path):
    put(tmp_path, "a.png")
    put(tmp_path, "b.png", caption=None)
    put(tmp_path, "c.png", caption=" \n")
    with pytest.raises(
        ValueError, match="2 of the 3 images in .* have no caption .*b.png.; write a .txt of the same name beside it, or list it"
    ):
        read_images(str(tmp_path), SIZE)
    assert read_images(str(tmp_path), SIZE, captioned=False).captions == ("a thing", "", "")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "a"}', 'line 1 names no file; write {"file_name": "a.png"'),
        ('{"file_name": "a.png"}', "line 1 has none of 'prompt', .*rename the one with the prompts"),
        ("a.png, a cat", "line 1 is not JSON .*; write one object a line"),
    ],
)
def test_a_bad_metadata_line_is_named(tmp_path, line, says):
    put(tmp_path, "a.png", caption=None)
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=f"metadata.jsonl, {says}"):
        read_images(str(tmp_path), SIZE)


def test_a_caption_that_is_not_utf8_is_named(tmp_path):
    put(tmp_path, "a.png", caption=None)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="a.txt is not UTF-8 .byte 3, line 1.; save it as UTF-8"):
        read_images(str(tmp_path), SIZE)


def test_a_source_that_is_no_folder_of_images_is_said_with_the_remedy(tmp_path):
    with pytest.raises(
        ValueError,
        match="no images at .*gone; give a folder with captions, .tar or .parquet files",
    ):
        read_images(str(tmp_path / "gone"), SIZE)
    with pytest.raises(ValueError, match="holds no images; put .png, .*files there"):
        read_images(str(tmp_path), SIZE)
    with pytest.raises(ValueError, match="no images at zoo:cats; the embedded worlds are zoo:sprites and zoo:clouds"):
        read_images("zoo:cats", SIZE)


def test_the_digest_follows_the_bytes_and_not_the_dates(tmp_path):
    file = put(tmp_path, "a.png")
    before = read_images(str(tmp_path), SIZE).digest
    raw = file.read_bytes()
    file.unlink()
    file.write_bytes(raw)
    assert read_images(str(tmp_path), SIZE).digest == before
    put(tmp_path, "a.png", Image.new("RGB", (8, 8), (254, 0, 0)))
    assert read_images(str(tmp_path), SIZE).digest != before


def test_files_are_decoded_once_for_good(tmp_path, monkeypatch):
    put(tmp_path / "images", "a.png")
    put(tmp_path / "images", "b.png").write_bytes(b"no")
    with pytest.warns(UserWarning, match="1 of the 2"):
        first = read_images(str(tmp_path / "images"), SIZE, cache=tmp_path / "cache")
    monkeypatch.setattr(module, "decode", lambda raw: pytest.fail("decoded again"))
    with pytest.warns(UserWarning, match="1 of the 2"):  # still said, though it was found earlier
        assert read_images(str(tmp_path / "images"), SIZE, cache=tmp_path / "cache") == first


def test_every_file_is_read_once_and_decoded_only_where_it_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "READ_CHUNK", 2)
    folder, read, decoded = tmp_path / "images", [], []
    for i in range(5):
        put(folder, f"{i}.png", Image.new("RGB", (8 + i, 8), (i, 0, 0)))
    plain, whole = Path.read_bytes, module.decode
    monkeypatch.setattr(Path, "read_bytes", lambda file: read.append(file.name) or plain(file))
    monkeypatch.setattr(module, "decode", lambda raw: decoded.append(raw) or whole(raw))

    def looked():
        read.clear(), decoded.clear()
        found = read_images(str(folder), SIZE, cache=tmp_path / "cache")
        return found, sorted(n for n in read if n.endswith("png")), len(decoded)

    first, *counts = looked()
    assert counts == [[f"{i}.png" for i in range(5)], 5]
    assert (first.digest, len(first)) == (read_images(str(folder), SIZE).digest, 5)
    put(folder, "4.png", Image.new("RGB", (8, 8), (9, 9, 9)))
    second, *counts = looked()
    assert counts == [[f"{i}.png" for i in range(5)], 1]  # the other chunks are known
    assert second.digest != first.digest


def test_zoo_images_come_with_their_captions(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "ZOO_CHUNK", 3)
    monkeypatch.setattr(module, "ZOO_COUNT", 6)
    found = read_images("zoo:sprites", (64, 64), cache=tmp_path)
    (a, says_a), (b, says_b) = sprites.draw(60_000, 3), sprites.draw(60_001, 3)
    np.testing.assert_array_equal(found.load(range(6), (64, 64)), np.concatenate([a, b]))
    assert found.captions == (*says_a, *says_b)
    assert found.load([0], (32, 16)).shape == (1, 32, 16, 3)
    monkeypatch.setattr(sprites, "draw", lambda *_: pytest.fail("drawn again"))
    assert read_images("zoo:sprites", (64, 64), cache=tmp_path).digest == found.digest


def test_the_zoo_has_8192_images():
    assert (module.ZOO_SEED, module.ZOO_CHUNK, module.ZOO_COUNT) == (60_000, 4096, 8192)
