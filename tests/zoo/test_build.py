"""Making the zoo: what a kill leaves is made again, and shipping replaces a teacher as a whole."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewstep.adapters import load_teacher
from fewstep.zoo import build, teachers


@pytest.fixture
def drawings(monkeypatch):
    monkeypatch.setattr(build, "pool", lambda work: np.zeros((4, 64, 64, 3), np.uint8))
    monkeypatch.setattr(build.vaes, "encode", lambda vae, images: (torch.ones(len(images), 1), torch.zeros(len(images), 1)))


def test_latents_that_were_half_written_are_made_again(drawings, tmp_path, monkeypatch):
    def killed(tensors, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "save_file", killed)
        build.latents(tmp_path, None, 8)
    mean, std = build.latents(tmp_path, None, 8)
    assert mean.shape == std.shape == (4, 1) and [f.name for f in tmp_path.iterdir()] == ["latents8.safetensors"]
    assert torch.equal(load_file(tmp_path / "latents8.safetensors")["mean"], mean)


@pytest.mark.parametrize("name", teachers.TEACHERS)
def test_a_recipe_makes_what_ships_and_what_it_begins_as_fits(name):
    recipe = teachers.TEACHERS[name]
    vae = build.vaes.make(recipe.factor)
    pipe = recipe.make(vae, **recipe.noise)
    for part, of in recipe.begun.items():
        build.begin_as(of, part, getattr(pipe, part))
    teacher = load_teacher(f"zoo:{name}")
    for part in ("vae", "text_encoder", teacher.family.component):
        build.begin_as(name, part, getattr(pipe, part))
    made, ships = pipe.scheduler.config, teacher.pipe.scheduler.config
    assert {k: v for k, v in made.items() if k[0] != "_"} == {k: ships[k] for k in made if k[0] != "_"}
    assert pipe.tokenizer.get_vocab() == teacher.pipe.tokenizer.get_vocab()


class Pipe:
    """Stands for a pipeline: one file that says in which precision it was saved."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.dtype = fails, torch.float32

    def to(self, dtype: torch.dtype) -> "Pipe":
        self.dtype = dtype
        return self

    def save_pretrained(self, folder, safe_serialization: bool) -> None:
        (folder / "model_index.json").write_text(f"{self.dtype}")
        if self.fails:
            raise OSError("no room")


def test_shipping_replaces_the_weights_as_a_whole_and_keeps_the_card(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "HERE", tmp_path)
    old = tmp_path / "sprites-sd"
    old.mkdir()
    before = {"card.json": "3.0", "README.md": "a card", "results.json": "rows", "model_index.json": "old", "gone.json": "old"}
    for name, text in before.items():
        (old / name).write_text(text)
    with pytest.raises(OSError, match="no room"):
        build.ship(Pipe(fails=True), "sprites-sd")
    assert {f.name: f.read_text() for f in old.iterdir()} == before
    pipe = Pipe()
    build.ship(pipe, "sprites-sd")
    card = {name: before[name] for name in build.CARD}
    assert {f.name: f.read_text() for f in old.iterdir()} == card | {"model_index.json": "torch.float16"}
    assert pipe.dtype == torch.float32 and [f.name for f in tmp_path.iterdir()] == ["sprites-sd"]
