"""Pictures of several shapes: a batch has one, conditions follow, and nothing but the stream decides what is drawn."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny import save, tiny_sdxl_pipeline

from fewstep import api
from fewstep.adapters import Teacher, load_teacher
from fewstep.config import parse
from fewstep.data import Buckets, Pairs, open_source, read_images
from fewstep.stream import stream

SHAPES = {"square": (70, 64), "wide": (60, 95), "wider": (64, 99), "tall": (128, 64), "banner": (64, 640)}  # (height, width)
PLACES = {"square": (64, 64), "wide": (48, 80), "wider": (48, 80), "tall": (80, 48), "banner": (48, 80)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tiny_sdxl_pipeline(), tmp_path_factory.mktemp("sdxl") / "pipe")


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(str(folder))


@pytest.fixture
def images(tmp_path):
    place = tmp_path / "images"
    place.mkdir()
    for i, (name, (height, width)) in enumerate(SHAPES.items()):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{name}.png")
        (place / f"{name}.txt").write_text(name)
    return str(place)


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(4)))
    return str(file)


def opened(teacher, images=None, needed=True, cache=None, aspect=2.0, **options):
    return open_source(teacher, images=images, images_needed=needed, aspect=aspect, cache=cache, **options)


def test_every_picture_has_the_nearest_shape_and_the_teachers_latents_of_it(teacher, images):
    source = opened(teacher, images)
    found = {name: (part, i) for part in source.sources for i, name in enumerate(part.prompts)}
    assert {name: tuple(8 * side for side in part.shape[1:]) for name, (part, _) in found.items()} == PLACES
    for name, (part, i) in found.items():
        height, width = PLACES[name]
        cut = ImageOps.fit(Image.open(f"{images}/{name}.png"), (width, height), Image.Resampling.LANCZOS)
        torch.testing.assert_close(part.latents[i], teacher.to_latents(np.array(cut)[None])[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part.cond.tensors["prompt"][i], teacher.encode([name]).tensors["prompt"][0])


def test_a_batch_has_one_shape_and_every_picture_is_drawn_as_often(teacher, images):
    source, seen = opened(teacher, images), Counter()
    known = {part.latents[i].sum().item(): name for part in source.sources for i, name in enumerate(part.prompts)}
    for step in range(2000):
        _, shape, latents, noise = source.draw(4, stream(0, 0, step, 0))
        assert tuple(latents.shape) == shape
        assert noise is None
        seen.update(known[x.sum().item()] for x in latents)
    for name in SHAPES:  # the standard deviation is at most that of 2000 draws of 4 alike
        assert seen[name] / 8000 == pytest.approx(0.2, abs=4 * 0.4 / 2000**0.5)


def test_the_stream_alone_decides_the_shape_and_the_rows(teacher, images):
    source = opened(teacher, images)
    for step in range(10):
        a, b = (source.draw(3, stream(0, 1, step, 0)) for _ in range(2))
        assert a.shape == b.shape and torch.equal(a.latents, b.latents)
    assert len({source.draw(3, stream(0, rank, 0, 0)).shape for rank in range(20)}) > 1  # of each process its own


def test_conditions_that_carry_the_size_follow_the_shape_in_both_halves_of_guidance(teacher, images, prompts):
    fed, guided = [], teacher.guided(teacher.net, 3.0)
    hook = teacher.net.register_forward_pre_hook(lambda *call: fed.append(call[2]["added_cond_kwargs"]), with_kwargs=True)
    sources = opened(teacher, images).sources + opened(teacher, None, False, prompts=prompts).sources
    for part in sources:
        cond, shape, *_ = part.draw(2, stream(0, 0, 0, 0))
        height, width = (8 * side for side in shape[2:])
        assert guided(torch.zeros(shape), torch.full((2,), 0.5), cond).x0.shape == shape
        assert fed[-1]["time_ids"].tolist() == [[height, width, 0, 0, height, width]] * 4
        assert not fed[-1]["text_embeds"][2:].any()  # no prompt
    hook.remove()
    assert len(fed) == len(sources) == 6
    own = teacher.resized(opened(teacher, images).first(3)).tensors["size"]  # for previews, which have the teacher's
    assert own.tolist() == [[64, 64, 0, 0, 64, 64]] * 3


def test_a_new_picture_is_encoded_with_those_of_its_shape_alone(teacher, images, tmp_path, monkeypatch):
    encoded, plain = [], Teacher.to_latents
    monkeypatch.setattr(Teacher, "to_latents", lambda self, x: encoded.append(x.shape[:3]) or plain(self, x))
    opened(teacher, images, cache=tmp_path / "cache")
    assert encoded == [(1, 64, 64), (3, 48, 80), (1, 80, 48)]
    again = opened(teacher, images, cache=tmp_path / "cache")
    assert len(encoded) == 3
    Image.new("RGB", (64, 100)).save(f"{images}/tall.png")
    changed = opened(teacher, images, cache=tmp_path / "cache")
    assert encoded[3:] == [(1, 80, 48)]
    assert torch.equal(again.sources[1].latents, changed.sources[1].latents)


def test_prompts_come_in_every_shape(teacher, prompts):
    source = opened(teacher, None, False, prompts=prompts)
    assert [part.prompts for part in source.sources] == [[f"prompt {i}" for i in range(4)]] * 3
    drawn = [source.draw(4, stream(0, 0, step, 0)) for step in range(600)]
    seen = Counter(batch.shape for batch in drawn)
    assert set(seen) == {(4, 4, h // 8, w // 8) for h, w in teacher.sizes(2.0)}
    assert all(n / 600 == pytest.approx(1 / 3, abs=0.08) for n in seen.values())


def test_pairs_are_made_in_every_shape(teacher, prompts, tmp_path):
    wish = Pairs(teacher.guided(teacher.net, 2.0), count=7, steps=1)
    source = opened(teacher, None, False, prompts=prompts, pairs=wish, cache=tmp_path / "cache")
    assert [len(part) for part in source.sources] == [3, 2, 2]
    for part in source.sources:
        assert part.noise.shape == part.latents.shape == (len(part), *part.shape)
        assert part.cond.tensors["size"][:, 0].unique().tolist() == [8 * part.shape[1]]


def test_one_shape_is_a_source_without_buckets(teacher, images):
    with pytest.warns(UserWarning, match="smaller than 64x64 and are enlarged"):
        source = opened(teacher, images, aspect=1.0)
    assert source.shape == teacher.latent_shape and len(source) == len(source.latents) == 5


def test_pictures_smaller_than_the_shape_they_get_are_told(tmp_path):
    for name, size in {"a": (80, 48), "b": (70, 48)}.items():  # of the first no pixel is made up, though 64x64 is taller
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    with pytest.warns(UserWarning, match="1 of the 2 images .* smaller than the shape they get, here 48x80, .*b.png"):
        read_images(str(tmp_path), (64, 64), (48, 80), captioned=False)


def test_a_run_over_shapes_resumes_bit_for_bit(folder, images, tmp_path, monkeypatch):
    """Its student simulates in every batch's shape, its heads judge pictures of it."""
    seen, plain = [], Buckets.draw

    def draw(self, n, rng):
        seen.append(plain(self, n, rng))
        return seen[-1]

    def config(rounds):
        role = {"weights": "lora", "rank": 2}
        return parse(
            {
                "teacher": {"path": str(folder), "guidance": 2.0},
                "student": role,
                "critic": role,
                "objective": {"name": "adversarial", "inner": {"name": "dmd", "steps": 2, "critic_turns": 1}},
                "data": {"images": images, "aspect": 2.0},
                "train": {"rounds": rounds, "batch": 2, "lr": 1e-3, "device": "cpu"},
            }
        )

    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(api.Study, "preview", lambda *_: None)
    monkeypatch.setattr(Buckets, "draw", draw)
    whole = api.train(config(4), tmp_path / "whole")
    assert len({batch.shape for batch in seen}) == 3
    api.train(config(2), tmp_path / "parts")
    parts = api.train(config(4), tmp_path / "parts", resume=True)
    assert whole.place.name == parts.place.name == "step-0000004"
    for file in whole.place.glob("*.safetensors"):
        assert file.read_bytes() == (parts.place / file.name).read_bytes(), file.name
