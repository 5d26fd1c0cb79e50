"""Image folders and the conversion to uint8 (traps 2, 12, 14, 15)."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.evaluation.images import check, digests, load_folder, save_folder, stream, to_uint8


def test_floats_are_rounded_clamped_and_never_wrap():
    np.testing.assert_array_equal(to_uint8(np.array([-1, 0, 1, 1.01, -1.01, 50])), [0, 128, 255, 255, 0, 255])
    np.testing.assert_array_equal(to_uint8(torch.tensor([-1.0, 1.01], dtype=torch.bfloat16)), [0, 255])


def test_every_level_survives_the_round_trip():
    levels = np.arange(256)
    np.testing.assert_array_equal(to_uint8(levels / 127.5 - 1), levels)
    np.testing.assert_array_equal(to_uint8(torch.arange(256).float() / 127.5 - 1), levels)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_no_number_is_refused(bad):
    with pytest.raises(ValueError, match="1 of 3 pixel values"):
        to_uint8(np.array([0, bad, 1]))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (np.random.rand(2, 4, 4, 3), "to_uint8"),
        ((np.random.rand(9, 4, 4, 3) > 0.5).astype(np.uint8), "no pixel exceeds 1"),
        (np.full((2, 3, 4, 4), 9, np.uint8), "channels last"),
        (np.full((4, 4, 3), 9, np.uint8), "N, H, W, 3"),
        (np.zeros((0, 4, 4, 3), np.uint8), "N, H, W, 3"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), "numpy"),
    ],
)
def test_a_wrong_range_or_shape_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        check(wrong)


def test_black_pictures_are_pictures():
    check(np.zeros((2, 4, 4, 3), np.uint8))


def test_saving_is_lossless_and_pairs_by_name(tmp_path, images):
    prompts, seeds = [f'a "quoted" prompt ü {i}' for i in range(24)], list(range(100, 124))
    save_folder(tmp_path, images[:10], prompts[:10], seeds[:10])
    save_folder(tmp_path, images[10:], prompts[10:], seeds[10:], start=10)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join(reversed(manifest.read_text("utf-8").splitlines())) + "\n", "utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = load_folder(tmp_path)
    np.testing.assert_array_equal(back.images, images)
    assert (back.prompts, back.seeds) == (prompts, seeds)


def test_a_folder_without_manifest_has_no_prompts(tmp_path, images):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    assert load_folder(tmp_path).prompts is None


def test_a_manifest_that_does_not_fit_is_refused(tmp_path, images):
    save_folder(tmp_path, images[:2], ["a", "b"], [0, 1])
    Image.fromarray(images[2]).save(tmp_path / "zz.png")
    with pytest.raises(ValueError, match="says nothing of zz.png"):
        load_folder(tmp_path)
    (tmp_path / "zz.png").unlink()
    (tmp_path / "000000.png").unlink()
    with pytest.raises(ValueError, match="lists 000000.png"):
        load_folder(tmp_path)
    (tmp_path / "manifest.jsonl").write_text('{"file": "000001.png"}\n')
    with pytest.raises(ValueError, match="line 1"):
        load_folder(tmp_path)


def test_mixed_sizes_are_refused(tmp_path, images):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    Image.fromarray(images[1][:16]).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="b.png is 32x16"):
        list(stream(tmp_path))


def test_lossy_files_are_named(tmp_path, images):
    Image.fromarray(images[0]).save(tmp_path / "a.jpg")
    with pytest.warns(UserWarning, match="lossy .a.jpg"):
        load_folder(tmp_path)


def test_grey_is_repeated_and_opaque_alpha_dropped(tmp_path, images):
    grey = images[0, ..., 0]
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(np.dstack([images[1], np.full((32, 32), 255, np.uint8)])).save(tmp_path / "b.png")
    found = load_folder(tmp_path).images
    np.testing.assert_array_equal(found[0], np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(found[1], images[1])


def test_transparency_and_sixteen_bits_are_refused(tmp_path, images):
    Image.fromarray(np.dstack([images[1], np.full((32, 32), 254, np.uint8)])).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="transparent"):
        load_folder(tmp_path)
    Image.fromarray(images[0, ..., 0].astype(np.uint16) * 256).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="8-bit RGB"):
        load_folder(tmp_path)


def test_a_file_that_is_no_image_is_named(tmp_path, images):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    for damage in (b"text", (tmp_path / "a.png").read_bytes()[:200]):
        (tmp_path / "b.png").write_bytes(damage)
        with pytest.raises(ValueError, match="b.png cannot be read as an image .*; save it again as PNG, or remove it"):
            load_folder(tmp_path)


def test_files_that_are_not_read_are_counted_once(tmp_path, images):
    for name in ("b.gif", "c.bmp", "d.tiff"):
        Image.fromarray(images[0]).save(tmp_path / name)
    with pytest.raises(ValueError, match="3 files .* are no PNG, JPEG or WebP .b.gif.; save them as PNG"):
        load_folder(tmp_path)
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    with pytest.warns(UserWarning) as said:
        assert load_folder(tmp_path).files == ["a.png"]
    assert len(said) == 1 and "3 files" in str(said[0].message) and "left out" in str(said[0].message)


def test_pictures_lie_at_any_depth_and_hidden_ones_are_not_meant(tmp_path, images):
    for i, name in enumerate(("b/000000.png", "a.png", "b/c/000000.png", ".thumbnails/a.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(images[i]).save(tmp_path / name)
    lines = [json.dumps({"file": f, "prompt": f"of {f}", "seed": 0}) for f in ("b/c/000000.png", "b/000000.png", "a.png")]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    found = load_folder(tmp_path)
    assert found.files == ["a.png", "b/000000.png", "b/c/000000.png"] and found.prompts == [f"of {f}" for f in found.files]
    np.testing.assert_array_equal(found.images, images[[1, 0, 2]])


@pytest.mark.parametrize("size", [None, 32])
def test_a_camera_held_upright_is_judged_by_its_upright_picture(tmp_path, images, size):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(images[0]).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(next(stream(tmp_path, size))[0], np.rot90(images[0], -1))


def test_a_size_cuts_about_the_centre(tmp_path):
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, 8:24] = 200
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert (next(stream(tmp_path, 16)) == 200).all()


def test_an_empty_folder_is_refused(tmp_path):
    for wrong in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="PNG"):
            load_folder(wrong)


def test_digests_tell_pictures_apart(images):
    twice = np.concatenate([images, images[:3]])
    assert len(np.unique(digests(twice))) == 24 and digests(twice).shape == (27,)
    assert json.dumps(digests(images).tolist()) == json.dumps(digests(np.asfortranarray(images)).tolist())
