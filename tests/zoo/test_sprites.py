"""The sprites world: drawing is a function of its seed, captions say what is drawn, and reading finds what was said."""

import numpy as np
import pytest

from fewstep.zoo.reading import accuracy, agreement, read
from fewstep.zoo.sprites import RELATIONS, Scene, Sprite, caption, captions, draw, parse, relation, scenes


def test_drawing_depends_on_the_seed_alone():
    first, text = draw(3, 16)
    again, same = draw(3, 16)
    other, _ = draw(4, 16)
    assert (first == again).all() and text == same == captions(3, 16)
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


def test_true_drawings_are_read_as_drawn():
    images, texts = draw(7, 500)
    assert accuracy(texts, images).mean() >= 0.99


def test_reading_finds_every_attribute_of_the_scene():
    found, numbers = scenes(8, 300)
    images, _ = draw(8, 300)
    for true, seen in zip(found, read(images), strict=True):
        assert seen.background == true.background
        assert sorted((s.size, s.colour, s.shape) for s in seen.sprites) == sorted(
            (s.size, s.colour, s.shape) for s in true.sprites
        )
    assert len(numbers["count"]) == 300


def test_shuffled_captions_score_much_lower():
    images, texts = draw(9, 200)
    assert accuracy(texts[1:] + texts[:1], images).mean() < 0.6


def test_parsing_a_caption_gives_back_the_scene():
    for scene in scenes(10, 200)[0]:
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
