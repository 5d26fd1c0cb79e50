import json
import shutil
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save, tiny_ddpm_pipeline, tiny_dit_pipeline, tiny_sd_pipeline, tiny_zimage_pipeline

from fewstep.adapters import Teacher, load_teacher
from fewstep.data import fingerprint, open_source
from fewstep.denoiser import cat
from fewstep.stream import stream

WORDS = ["a red circle", "a blue square", "a green star", "a cross", "a cyan thing"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    makers = {"sd": tiny_sd_pipeline, "zimage": tiny_zimage_pipeline, "ddpm": tiny_ddpm_pipeline, "dit": tiny_dit_pipeline}
    return {name: save(make(), tmp_path_factory.mktemp(name) / "pipe") for name, make in makers.items()}


@pytest.fixture(scope="module")
def teachers(folders):
    return {name: load_teacher(str(folder)) for name, folder in folders.items()}


@pytest.fixture
def teacher(teachers):
    return teachers["sd"]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(WORDS))
    return str(file)


@pytest.fixture
def images(tmp_path):
    return picture_folder(tmp_path / "images", 64)


def picture_folder(folder, side, n=5, captioned=True, words=WORDS):
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    for i in range(n):
        Image.fromarray(pixels[i]).save(folder / f"{i}.png")
        if captioned:
            (folder / f"{i}.txt").write_text(words[i])
    return str(folder)


def pixels_of(folder, n=5):
    return np.stack([np.asarray(Image.open(f"{folder}/{i}.png")) for i in range(n)])


def same(a, b):
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


@pytest.fixture
def calls(monkeypatch):
    """How many rows were encoded since: {"encode": ..., "to_latents": ...}."""
    counts = {"encode": 0, "to_latents": 0}

    def counting(name):
        plain = getattr(Teacher, name)

        def counted(self, rows, *rest):
            counts[name] += len(rows)
            return plain(self, rows, *rest)

        monkeypatch.setattr(Teacher, name, counted)

    for name in counts:
        counting(name)
    return counts


@pytest.mark.parametrize("family", ["sd", "zimage", "ddpm"])
def test_rows_are_the_teachers_own_encodings_whatever_the_batch(teachers, family, prompts):
    teacher = teachers[family]
    source = open_source(teacher, prompts=prompts, images_needed=False, cache=None, batch=2)
    assert source.prompts == WORDS
    assert len(source) == len(source.cond) == 5
    assert source.shape == teacher.latent_shape
    assert source.latents is None
    exact = cat([teacher.encode([word]) for word in WORDS])
    assert source.cond.tensors.keys() == exact.tensors.keys()
    for name, tensor in exact.tensors.items():
        torch.testing.assert_close(source.cond.tensors[name], tensor, rtol=1e-4, atol=1e-5)
    assert same(source.null, teacher.null())


def test_a_folder_packed_into_a_shard_is_not_encoded_again(teacher, images, tmp_path, calls):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for file in sorted(Path(images).iterdir()):
            shard.add(file, file.name)
    loose, packed = (
        open_source(teacher, images=path, images_needed=True, cache=tmp_path / "c") for path in (images, str(tmp_path / "a.tar"))
    )
    assert calls == {"encode": 5 + 1, "to_latents": 5}  # the one is the null condition
    assert torch.equal(loose.latents, packed.latents)
    assert loose.prompts == packed.prompts == WORDS


@pytest.mark.parametrize("family", ["sd", "zimage"])
def test_latents_are_the_teachers_own_and_survive_the_cache(teachers, family, images, tmp_path, calls):
    teacher = teachers[family]
    first, second = (open_source(teacher, images=images, images_needed=True, cache=tmp_path / "c", batch=2) for _ in range(2))
    assert calls["to_latents"] == 5
    exact = teacher.to_latents(pixels_of(images))
    assert first.latents.shape == (5, *teacher.latent_shape)
    torch.testing.assert_close(first.latents, exact, rtol=1e-4, atol=1e-5)
    assert torch.equal(first.latents, second.latents)
    assert same(first.cond, second.cond)
    assert same(first.null, second.null)
    np.testing.assert_allclose(teacher.to_images(second.latents).astype(int), teacher.to_images(exact).astype(int), atol=1)


def test_pixels_come_back_exactly_from_a_teacher_without_a_vae(teachers, tmp_path):
    teacher = teachers["ddpm"]
    folder = picture_folder(tmp_path / "images", 8)
    source = open_source(teacher, images=folder, images_needed=True, cache=tmp_path / "cache")
    np.testing.assert_array_equal(teacher.to_images(source.latents), pixels_of(folder))


def test_an_unconditional_teacher_needs_no_captions_and_a_text_teacher_does(teachers, tmp_path):
    folder = picture_folder(tmp_path / "images", 8, captioned=False)
    source = open_source(teachers["ddpm"], images=folder, images_needed=True, cache=None)
    assert len(source) == len(source.latents) == 5
    for name in ("sd", "dit"):
        with pytest.raises(ValueError, match="have no caption"):
            open_source(teachers[name], images=folder, images_needed=True, cache=None)


def test_the_captions_of_a_class_conditional_teacher_are_classes(teachers, tmp_path):
    folder = picture_folder(tmp_path / "images", 64, words=["207", "otter", "0", "999", "golden"])
    source = open_source(teachers["dit"], images=folder, images_needed=True, cache=None)
    assert source.cond.tensors["label"].tolist() == [207, 360, 0, 999, 207]


def test_the_captions_of_the_images_are_the_prompts(teacher, images):
    source = open_source(teacher, images=images, images_needed=True, cache=None)
    assert source.prompts == WORDS
    assert same(source.cond, teacher.encode(WORDS))


def test_images_that_no_objective_looks_at_are_not_encoded(teacher, images, calls):
    source = open_source(teacher, images=images, images_needed=False, cache=None)
    assert source.latents is None
    assert source.prompts == WORDS
    assert calls["to_latents"] == 0


def test_the_same_stream_draws_the_same_rows_and_another_does_not(teacher, images):
    source = open_source(teacher, images=images, images_needed=True, cache=None)
    (cond, _, latents, _), (again, _, latents_again, _) = (source.draw(16, stream(0, 0, 3, 1)) for _ in range(2))
    assert same(cond, again)
    assert torch.equal(latents, latents_again)
    for other in (stream(1, 0, 3, 1), stream(0, 1, 3, 1), stream(0, 0, 4, 1), stream(0, 0, 3, 2)):
        assert not torch.equal(source.draw(16, other).latents, latents)


def test_a_drawn_condition_belongs_to_the_drawn_latent(teacher, images):
    source = open_source(teacher, images=images, images_needed=True, cache=None)
    cond, _, latents, _ = source.draw(64, stream(0, 0, 0, 0))
    assert cond.tensors["prompt"].shape[0] == len(latents) == 64
    rows = [next(i for i in range(5) if torch.equal(source.latents[i], latent)) for latent in latents]
    assert set(rows) == set(range(5))
    assert same(cond, source.cond[torch.tensor(rows)])


def test_without_images_only_conditions_are_drawn(teacher, prompts):
    cond, _, latents, _ = open_source(teacher, prompts=prompts, images_needed=False, cache=None).draw(3, stream(0, 0, 0, 0))
    assert len(cond) == 3
    assert latents is None


def test_prompts_are_encoded_once(teacher, prompts, tmp_path, calls):
    for _ in range(2):
        open_source(teacher, prompts=prompts, images_needed=False, cache=tmp_path / "cache")
    assert calls["encode"] == 5 + 1  # and the empty prompt


def test_another_prompt_or_picture_is_encoded_anew(teacher, prompts, images, tmp_path, calls):
    cache = tmp_path / "cache"
    open_source(teacher, images=images, images_needed=True, cache=cache)
    open_source(teacher, prompts=prompts, images_needed=False, cache=cache)  # the captions of the images are these prompts
    assert calls == {"encode": 6, "to_latents": 5}
    (tmp_path / "prompts.txt").write_text("\n".join([*WORDS[1:], WORDS[0]]))
    source = open_source(teacher, prompts=prompts, images_needed=False, cache=cache)
    assert calls == {"encode": 12, "to_latents": 5}
    assert same(source.cond, teacher.encode(source.prompts))
    Image.new("RGB", (64, 64)).save(f"{images}/0.png")
    source = open_source(teacher, images=images, images_needed=True, cache=cache)
    assert calls["to_latents"] == 10
    torch.testing.assert_close(source.latents, teacher.to_latents(pixels_of(images)), rtol=1e-4, atol=1e-5)


def test_a_damaged_cache_is_made_again(teacher, prompts, tmp_path, calls):
    cache = tmp_path / "cache"
    first = open_source(teacher, prompts=prompts, images_needed=False, cache=cache)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="is damaged and made again"):
        second = open_source(teacher, prompts=prompts, images_needed=False, cache=cache)
    assert same(first.cond, second.cond)
    assert calls["encode"] == 12


def change_weights(folder, part):
    getattr(tiny_sd_pipeline(seed=1), part).save_pretrained(folder / part)


def change_tokenizer(folder):
    file = folder / "tokenizer" / "tokenizer.json"
    text = file.read_text()
    assert '"a": 64,' in text
    file.write_text(text.replace('"a": 64,', '"a": 9999,'))


def change_config(folder):
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 1.0}))


@pytest.mark.parametrize(
    ("change", "matters"),
    [
        (lambda folder: None, False),
        (lambda folder: change_weights(folder, "vae"), True),
        (lambda folder: change_weights(folder, "text_encoder"), True),
        (lambda folder: change_weights(folder, "unet"), False),  # what is distilled encodes nothing
        (change_tokenizer, True),
        (change_config, True),
    ],
    ids=["copy", "vae", "text_encoder", "unet", "tokenizer", "config"],
)
def test_a_fingerprint_follows_what_decides_the_encodings(folders, teachers, tmp_path, change, matters):
    folder = tmp_path / "copy"
    shutil.copytree(folders["sd"], folder)
    change(folder)
    assert (fingerprint(replace(teachers["sd"], path=str(folder))) != fingerprint(teachers["sd"])) == matters


def test_a_teacher_without_a_folder_is_known_by_its_loaded_weights(teachers):
    def in_memory(seed):
        return replace(teachers["sd"], path="owner/model", pipe=tiny_sd_pipeline(seed))

    assert fingerprint(in_memory(0)) == fingerprint(in_memory(0))
    assert fingerprint(in_memory(0)) != fingerprint(in_memory(1))


@pytest.mark.parametrize(
    ("given", "needed", "says"),
    [
        ({}, True, r"objective needs images: add data.images \(a folder with captions\) or data.images: zoo:sprites$"),
        ({"prompts": "p.txt"}, True, "objective needs images: add data.images .* zoo:sprites, in place of data.prompts"),
        ({"prompts": "p.txt", "images": "folder"}, True, "data.prompts and data.images are both given; keep one"),
        ({"prompts": "p.txt", "images": "folder"}, False, "data.prompts and data.images are both given; keep one"),
        ({}, False, "there is no data: add data.prompts .* or data.images"),
    ],
)
def test_data_that_do_not_fit_are_refused_with_the_remedy(teacher, given, needed, says, calls):
    with pytest.raises(ValueError, match=says):
        open_source(teacher, **given, images_needed=needed, cache=None)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_only_where_it_is_wanted(teacher, images, capsys, progress):
    open_source(teacher, images=images, images_needed=True, cache=None, progress=progress)
    shown = capsys.readouterr().err
    assert ("encoding prompts" in shown and "encoding images" in shown) == progress


@pytest.mark.parametrize("name", ["sd", "zimage"])
def test_prompts_that_the_teacher_reads_in_part_are_counted_in_one_line_and_no_others(teachers, name, tmp_path):
    teacher, file = teachers[name], tmp_path / "prompts.txt"
    limit = teacher.family.tokens(teacher.pipe, [""])[1]
    (most,) = [n for n in range(limit + 1) if teacher.family.tokens(teacher.pipe, ["a" + " a" * n])[0] == [limit]]
    fits = ["a", "a" + " a" * most]
    for words, cut in ((fits, 0), ([*fits, *(fits[1] + " a" * n for n in (1, 200, 300))], 3)):
        file.write_text("\n".join(words))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            open_source(teacher, prompts=str(file), images_needed=False, cache=None, batch=1)
        said = [str(w.message) for w in caught if "prompts are longer" in str(w.message)]
        assert said == [f"{cut} of 5 prompts are longer than the {limit} tokens that this teacher reads, and cut"] * bool(cut)
    cond = teacher.encode(words)
    assert same(cond[3:4], cond[4:]) and not same(cond[:1], cond[1:2])  # what is behind the limit is not seen
