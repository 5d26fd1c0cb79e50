"""Making the zoo: what a kill leaves is made again, and shipping replaces a teacher as a whole."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewstep.adapters import Teacher, load_teacher
from fewstep.families import FAMILIES, Setting
from fewstep.zoo import build, recipes
from fewstep.zoo.sprites import draw


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


def untrained(name):
    """The untrained pipeline of a recipe."""
    torch.manual_seed(0)
    recipe = recipes.TEACHERS[name]
    vae = build.vaes.make_deterministic(recipe.factor) if recipe.tutor else build.vaes.make(recipe.factor)
    return recipe.make(vae, **recipe.noise)


CAPTIONS = ["a small red circle on a white background", "a large blue square left of a small green star on a black background"]


@pytest.mark.parametrize("name", recipes.TEACHERS)
@torch.no_grad()
def test_the_states_that_a_denoiser_learns_from_are_those_its_pipeline_encodes(name):
    pipe = untrained(name)
    family = FAMILIES[type(pipe).__name__]
    teacher = Teacher("made", pipe, family, family.schedule(pipe.scheduler), "", Setting((64, 64), 1.0))
    trainee = recipes.TEACHERS[name].trainee(pipe, CAPTIONS).eval()
    for rows, theirs in (([1, 2], teacher.encode(CAPTIONS)), ([0], teacher.null())):
        mine = trainee.cond(torch.tensor(rows))
        assert mine.tensors.keys() == theirs.tensors.keys()
        lengths = theirs.tensors.get("length", torch.full((len(rows),), theirs.tensors["prompt"].shape[1]))
        assert "length" not in mine.tensors or mine.tensors["length"].tolist() == lengths.tolist()
        for i, n in enumerate(lengths.tolist()):
            torch.testing.assert_close(mine.tensors["prompt"][i, :n], theirs.tensors["prompt"][i, :n], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_tutor_says_the_guided_velocity_of_its_teacher():
    guidance, x, t = 1.7, torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 0.999])
    teacher = load_teacher("zoo:clouds-sd")
    cond, null = teacher.encode([CAPTIONS[0], "", CAPTIONS[1]]), teacher.encode([""] * 3)
    denoiser = teacher.denoiser(teacher.net)
    level = teacher.schedule.t_of_ratio(t / (1 - t))  # on the path of constant variance
    said, unsaid = (denoiser(x / (t**2 + (1 - t) ** 2).sqrt()[:, None, None, None], level, c) for c in (cond, null))
    velocity = unsaid.velocity + guidance * (said.velocity - unsaid.velocity)
    tutor = build.tutor("clouds-sd", guidance, CAPTIONS)
    torch.testing.assert_close(tutor(x, t, torch.tensor([1, 0, 2])), velocity, rtol=1e-3, atol=1e-3)
    ends = tutor.within(torch.tensor([0.0, 1.0]))
    assert 0 < ends[0] < 0.01 and 0.999 < ends[1] < 1


@torch.no_grad()
def test_one_who_is_taught_is_at_rest_where_it_says_what_its_tutor_does():
    trainee = recipes.TEACHERS["clouds-flow"].trainee(untrained("clouds-flow"), CAPTIONS, build.tutor("clouds-sd", 1.5, CAPTIONS))
    x0, rows = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 1])
    asked = []

    def exact(net, x, time, cond):
        asked.append(time)
        return trainee.tutor(x, time.double() / 1000, rows)

    loss = trainee.loss(x0, rows, torch.Generator().manual_seed(2))
    trainee.denoiser = dataclasses.replace(trainee.denoiser, call=exact)
    assert trainee.loss(x0, rows, torch.Generator().manual_seed(2)) < 1e-5 < loss and len(asked) == 1
    trainee.tutor, tutor = None, trainee.tutor
    trainee.denoiser = dataclasses.replace(trainee.denoiser, call=lambda net, x, time, cond: tutor(x, time.double() / 1000, rows))
    assert trainee.loss(x0, rows, torch.Generator().manual_seed(2)) > 1e-2  # of the data itself: there is noise in it


def test_an_imitator_learns_the_latents_and_the_pictures():
    rng = torch.Generator().manual_seed(0)
    images, _ = draw(3, 4, "clouds")
    model = build.vaes.make(4)
    build.begin_as("clouds-sd", "vae", model)
    mean, std = build.vaes.encode(model.eval(), images)
    torch.manual_seed(0)
    vae = build.vaes.make_deterministic(4)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    x = build.vaes.pixels(images)

    @torch.no_grad()
    def errors():
        return (vae.encode(x).latent - mean).square().mean(), (vae.decode(mean).sample - x).abs().mean()

    before = errors()
    for _ in range(25):
        optimizer.zero_grad()
        build.vaes.imitation_loss(vae, images, mean, std, rng).backward()
        optimizer.step()
    assert all(after < 0.5 * was for after, was in zip(errors(), before, strict=True))


@pytest.mark.parametrize("name", recipes.TEACHERS)
def test_a_recipe_makes_what_ships_and_what_it_begins_as_fits(name):
    recipe, pipe = recipes.TEACHERS[name], untrained(name)
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
