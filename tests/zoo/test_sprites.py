"""The sprites world: drawing is a function of its seed, captions say what is drawn, and reading finds what was said."""

import hashlib

import numpy as np
import pytest

from fewstep.zoo import WORLDS
from fewstep.zoo.reading import accuracy, agreement, read
from fewstep.zoo.sprites import RELATIONS, SKIES, Scene, Sprite, caption, captions, draw, paint, parse, relation, scenes

EVERY_WORLD = pytest.mark.parametrize("world", WORLDS)


@EVERY_WORLD
def test_drawing_depends_on_the_seed_alone(world):
    first, text = draw(3, 16, world)
    again, same = draw(3, 16, world)
    other, _ = draw(4, 16, world)
    assert (first == again).all() and text == same == captions(3, 16, world)
    assert (first != other).any()
    assert first.shape == (16, 64, 64, 3) and first.dtype == np.uint8


def test_captions_leave_entropy_in_the_pictures():
    """Equal captions, different pictures: what the caption does not say varies."""
    images, texts = draw(5, 1500)
    twins = [(i, j) for i, a in enumerate(texts) for j in range(i + 1, len(texts)) if texts[j] == a][:20]
    assert len(twins) == 20
    assert all(np.abs(images[i].astype(float) - images[j]).mean() > 1 for i, j in twins)


def test_sprites_of_a_scene_have_distinct_colours_and_lie_apart_inside_the_frame():
    found, _ = scenes(6, 500)
    for scene in found:
        colours = [s.colour for s in scene.sprites]
        assert len(set(colours)) == len(colours)
        assert all(6 < s.x < 58 and 6 < s.y < 58 for s in scene.sprites)
    assert {len(s.sprites) for s in found} == {1, 2, 3}


def test_the_drawings_of_sprites_are_those_that_its_results_were_measured_on():
    assert hashlib.sha256(draw(1000, 300)[0].tobytes()).hexdigest()[:12] == "dff6dda95640"


def test_skies_have_the_contrast_of_their_name_which_only_captions_with_textures_say():
    found, numbers = scenes(15, 600, "clouds")
    numbers["count"] = np.zeros_like(numbers["count"])  # grounds alone
    numbers["tint"], numbers["slope"] = np.zeros_like(numbers["tint"]), np.zeros_like(numbers["slope"])
    bright = paint(numbers)[..., 0] / 255
    for sky, deviation in SKIES.items():
        of = [i for i, scene in enumerate(found) if scene.sky == sky and scene.background == "grey"]
        assert len(of) > 20 and abs(np.mean([bright[i].std() for i in of]) - deviation) < 0.05 * deviation + 1e-3
        i = of[0]
        assert f"on a {sky} grey background" in caption(found[i], texture=True)
        assert "on a grey background" in caption(found[i])
    assert {scene.sky for scene in scenes(15, 20)[0]} == {""}


@EVERY_WORLD
def test_true_drawings_are_read_as_drawn(world):
    images, texts = draw(7, 500, world)
    assert accuracy(texts, images).mean() >= 0.99


@EVERY_WORLD
def test_reading_finds_every_attribute_of_the_scene(world):
    found, numbers = scenes(8, 300, world)
    images, _ = draw(8, 300, world)
    for true, seen in zip(found, read(images), strict=True):
        assert seen.background == true.background
        assert sorted((s.size, s.colour, s.shape) for s in seen.sprites) == sorted(
            (s.size, s.colour, s.shape) for s in true.sprites
        )
    assert len(numbers["count"]) == 300


def test_shuffled_captions_score_much_lower():
    images, texts = draw(9, 200)
    assert accuracy(texts[1:] + texts[:1], images).mean() < 0.6


@EVERY_WORLD
def test_parsing_a_caption_gives_back_the_scene(world):
    for scene in scenes(10, 200, world)[0]:
        for textured in (False, True):
            claim = parse(caption(scene, texture=textured))
            assert claim.nouns == tuple((s.size, s.colour, s.shape) for s in scene.sprites)
            assert claim.background == scene.background
            if len(scene.sprites) > 1:
                assert claim.relation == relation(scene.sprites[0], scene.sprites[1])


def test_each_broken_claim_costs_its_own_score():
    a, b = Sprite("small", "red", "circle", 16, 32), Sprite("large", "blue", "square", 48, 32)
    text = caption(Scene((a, b), "grey"))
    assert text == "a small red circle left of a large blue square on a grey background"
    right = agreement(text, Scene((a, b), "grey"))
    assert set(right.values()) == {1.0}
    wrong = agreement(text, Scene((b, Sprite("small", "red", "star", 60, 32)), "black"))
    assert wrong == {"colour": 1.0, "shape": 0.5, "size": 1.0, "count": 1.0, "background": 0.0, "relation": 0.0}
    assert agreement(text, Scene((a,), "grey"))["count"] == 0.0


def test_relations_are_antisymmetric():
    rng = np.random.default_rng(0)
    for x, y, u, v in rng.uniform(0, 64, (200, 4)):
        a, b = Sprite("small", "red", "star", x, y), Sprite("small", "blue", "star", u, v)
        there, back = relation(a, b), relation(b, a)
        assert (there is None and back is None) or RELATIONS[there] == back


def test_a_text_of_another_world_is_refused_with_an_example():
    with pytest.raises(ValueError, match="small red circle"):
        parse("a photograph of a dog")


def test_pictures_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        read(np.zeros((1, 64, 64, 3), np.float32))
