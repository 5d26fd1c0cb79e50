"""A student's further inputs: it starts as its teacher, every embedder weight learns, and stock Diffusers feeds it alike."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import save, tiny_ddpm_pipeline, tiny_sd_pipeline, tiny_zimage_pipeline
from toys import NOTHING, SCHEDULES, times

from fewstep import embedders, proof
from fewstep.adapters import load_teacher
from fewstep.denoiser import Denoiser, Guided
from fewstep.export import export
from fewstep.networks import Full, build

BOTH = (embedders.GUIDANCE, embedders.END)
T = times(0.999, 0.5, 0.25)
G, R = times(1.0, 3.0, 7.5), times(0.75, 0.25, 0.0)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    makers = {"sd": tiny_sd_pipeline, "zimage": tiny_zimage_pipeline, "ddpm": tiny_ddpm_pipeline}
    return {name: load_teacher(str(save(make(), root / name))) for name, make in makers.items()}


def player(teacher, inputs=BOTH):
    role = build(copy.deepcopy(teacher.net), {"student": Full(inputs)}, lora_targets=())["student"]
    return role, teacher.denoiser(role, 3.0, (1.0, 0.5))


def given(teacher):
    words = ["1", "2", "3"] if teacher.family.component == "unet" else ["red", "a blue square", "green"]
    return torch.randn(3, *teacher.latent_shape), T, teacher.encode(words)


@pytest.mark.parametrize("name", ["sd", "zimage", "ddpm"])
def test_the_student_starts_as_its_teacher_and_every_embedder_weight_learns(name, teachers):
    teacher, ask = teachers[name], given(teachers[name])
    role, student = player(teacher)
    expected = teacher.denoiser(teacher.net)(*ask)
    assert torch.equal(student(*ask, g=G, r=R).eps, expected.eps)
    weights = {k: p for k, p in role.weights().items() if k.startswith("gained.") or "cond_proj" in k}
    assert len(weights) == (5 if name == "sd" else 8)
    optimizer, moved = torch.optim.SGD(weights.values(), 0.1), set()
    goal = torch.randn_like(expected.eps)
    for _ in range(2):
        role.zero_grad()
        (student(*ask, g=G, r=R).eps - goal).square().mean().backward()
        moved |= {k for k, p in weights.items() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert moved == set(weights)
    trained = student(*ask, g=G, r=R).eps
    assert not torch.equal(trained, student(*ask, g=G + 1, r=R).eps)
    assert not torch.equal(trained, student(*ask, g=G, r=R / 2).eps)
    assert not torch.equal(trained[:2], student(*ask, g=G, r=-R).eps[:2])  # the sign tells TwinFlow's two flows apart
    torch.testing.assert_close(trained[1:], student(*(x[1:] for x in ask), g=G[1:], r=R[1:]).eps)


def test_waves_are_those_of_the_stock_pipeline():
    w = torch.tensor([0.0, 2.0, 6.5])
    assert torch.equal(embedders.waves(w), StableDiffusionPipeline.get_guidance_scale_embedding(None, w, 256))


def test_a_scale_or_an_end_that_is_not_named_is_that_of_deployment(teachers):
    ask = given(teachers["sd"])
    role, student = player(teachers["sd"])
    for p in role.weights().values():
        p.data += 0.02 * torch.randn_like(p)
    explicit = student(*ask, g=torch.full((3,), 3.0), r=times(0.5, 0.0, 0.0)).eps
    assert torch.equal(student(*ask).eps, explicit)
    with pytest.raises(ValueError, match="this network takes the input guidance_scale"):
        teachers["sd"].denoiser(role)(*ask)


def test_the_next_time_of_the_grid_is_the_end():
    told = []

    def call(net, x, time, cond):
        return net(x)

    def net(x, **inputs):
        told.append(inputs)
        return x

    denoiser = Denoiser(net, SCHEDULES["sd"], "epsilon", call, grid=(1.0, 0.75, 0.5, 0.25))
    denoiser(torch.zeros(6, 2), times(1.0, 0.75, 0.7, 0.5, 0.25, 0.1), NOTHING)
    assert told[0]["end_time"].tolist() == [0.75, 0.5, 0.5, 0.25, 0.0, 0.0] and set(told[0]) == {"end_time"}


def test_a_teacher_that_takes_the_scale_is_one_pass(teachers, tmp_path):
    """A distilled network comes back from its export as one that is guided by what it is fed."""
    teacher, ask = teachers["sd"], given(teachers["sd"])
    kind = Full((embedders.GUIDANCE,))
    role = build(copy.deepcopy(teacher.net), {"student": kind}, lora_targets=())["student"]
    weights = {k: p.detach() + 0.02 * torch.randn_like(p) for k, p in role.weights().items()}
    for key, p in role.weights().items():
        p.data.copy_(weights[key])
    into = tmp_path / "guided"
    export(teacher, kind, weights, sampler="ddim", steps=4, to=into, record={}, guidance=2.5, scales=(1.0, 6.0))
    assert "is an input of the network, trained at scales from 1 to 6: others in that range" in (into / "README.md").read_text()
    again = load_teacher(str(into))
    assert again.guidance == 2.5  # its own, and not its family's 7.5
    assert embedders.inputs(again.net) == (embedders.GUIDANCE,)
    guided = again.guided(again.net, 2.5, again.null())
    assert not isinstance(guided, Guided) and isinstance(teacher.guided(teacher.net, 2.5, teacher.null()), Guided)
    torch.testing.assert_close(guided(*ask).eps, teacher.denoiser(role, 2.5)(*ask).eps)
    assert not torch.equal(guided(*ask).eps, guided(*ask, g=G).eps)
    # and a student of it starts as it is, with no second embedding
    student = build(copy.deepcopy(again.net), {"student": kind}, lora_targets=())["student"]
    torch.testing.assert_close(again.denoiser(student, 2.5)(*ask).eps, guided(*ask).eps)


def test_a_scale_that_is_in_the_weights_is_named_and_is_not_guided_again(teachers, tmp_path):
    teacher, kind = teachers["zimage"], Full((embedders.GUIDANCE,))
    role = build(copy.deepcopy(teacher.net), {"student": kind}, lora_targets=())["student"]
    weights = {k: p.detach() for k, p in role.weights().items()}
    into = tmp_path / "folded"
    export(teacher, kind, weights, sampler="ddim", steps=4, to=into, record={}, guidance=2.5, scales=(1.0, 6.0))
    assert (
        "Guidance of 2.5 is in these weights, trained at scales from 1 to 6; `guidance_scale=0.0` adds none."
        in (into / "README.md").read_text()
    )
    again = load_teacher(str(into))
    assert again.guidance == 1.0
    (into / "fewstep.json").write_text("[]")
    with pytest.raises(ValueError, match="fewstep.json is damaged; export the student again"):
        _ = again.guidance


@pytest.mark.parametrize("name, inputs", [("sd", (embedders.END,)), ("sd", BOTH), ("zimage", BOTH), ("ddpm", (embedders.END,))])
def test_the_one_jump_of_a_one_step_student_is_exported(name, inputs, teachers, tmp_path):
    """Stock Diffusers draws what the student draws whose jump ends at the clean end."""
    teacher, kind = teachers[name], Full(inputs)
    role = build(copy.deepcopy(teacher.net), {"student": kind}, lora_targets=())["student"]
    weights = {k: p.detach() + 0.02 * torch.randn_like(p) for k, p in role.weights().items()}
    for key, p in role.weights().items():
        p.data.copy_(weights[key])
    ask = given(teacher)
    told = teacher.denoiser(role, 2.5, (1.0,))
    assert torch.equal(told(*ask).x0, told(*ask, r=torch.zeros_like(T)).x0)
    assert not torch.equal(told(*ask).x0, told(*ask, r=T / 2).x0)
    export(teacher, kind, weights, sampler="ddim", steps=1, to=tmp_path / "one", record={}, guidance=2.5)
    assert not [c for c in proof.prove(tmp_path / "one", "", tmp_path) if not c["ok"]]
    again = load_teacher(str(tmp_path / "one"))
    torch.testing.assert_close(again.denoiser(again.net, 2.5)(*ask).x0, told(*ask).x0, rtol=1e-4, atol=1e-4)


def test_a_network_with_a_hidden_time_embedding_is_refused():
    with pytest.raises(ValueError, match="embeds its time where fewstep does not look"):
        embedders.gain(type("Odd", (torch.nn.Linear,), {"config": {}})(2, 2), BOTH)
