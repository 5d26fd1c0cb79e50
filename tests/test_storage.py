"""Frozen weights kept small: what they come back as, and that adapters learn on them as on whole ones."""

import copy

import pytest
import torch
from test_memory import config
from tiny import MAKERS, save, tiny_sd_pipeline
from torch import nn

from fewstep import api
from fewstep.costs import Ledger
from fewstep.networks import Lora, build
from fewstep.preview import Preview
from fewstep.storage import KEEPINGS, keep_small, nf4_levels, noting
from fewstep.verify import verify

# The share of a row's (nf4: a block's) largest weight that a weight may be off: half a step of 3 bits, of 127 levels, of NF4's.
OFF = {"fp8": 2**-4, "int8": 0.5 / 127, "nf4": (1 - 0.6961928) / 2, "host": 0.0}
kinds = pytest.mark.parametrize("kind", KEEPINGS)


def kept(net, kind, dtype=torch.float32):
    keep_small(net.requires_grad_(False), KEEPINGS[kind], dtype, ())
    return net


@kinds
@pytest.mark.parametrize("layer", [nn.Linear(24, 5), nn.Conv2d(3, 7, 3), nn.Conv3d(2, 3, 2)], ids=str)
def test_a_weight_comes_back_as_near_as_its_format_promises(layer, kind):
    layer = copy.deepcopy(layer)
    before = layer.weight.detach().clone()
    net = kept(nn.Sequential(layer), kind)
    assert layer.weight.shape == before.shape and layer.weight.dtype == torch.float32
    largest = before.abs().max() if kind == "nf4" else before.flatten(1).abs().amax(1).reshape(-1, *[1] * (before.ndim - 1))
    assert ((layer.weight - before).abs() <= OFF[kind] * largest * 1.0001).all()
    held = sum(p.numel() * p.element_size() for p in net.parameters() if p.dtype != torch.float32)
    assert held == {"fp8": 1, "int8": 1, "host": 0}.get(kind, 0) * before.numel() or kind == "nf4"


def test_what_a_format_cannot_tell_apart_is_exact():
    """Numbers that lie on the levels come back exactly, and a row of zeros as zeros."""
    for kind, row in {"fp8": [448.0, -208.0, 0.5], "int8": [127.0, -3.0, 0.0], "nf4": [*nf4_levels()[:3].tolist(), 1.0]}.items():
        layer = nn.Linear(len(row), 2, bias=False)
        layer.weight.data = torch.tensor([row, [0.0] * len(row)])
        before = layer.weight.detach().clone()
        kept(nn.Sequential(layer), kind)
        torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=1e-6)


def test_the_levels_of_nf4_are_those_of_its_paper():
    """QLoRA, arXiv 2305.14314, appendix E."""
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302]
    published += [0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    assert nf4_levels().tolist() == pytest.approx(published, abs=1e-6)


def on_base(kind, checkpointing=False, dtype=torch.float32):
    """A student on a base kept so, the same on a whole base of the weights that those unpack to, and their inputs."""
    net, twin = (tiny_sd_pipeline().unet for _ in range(2))
    twin.load_state_dict(net.state_dict())
    options = {"lora_targets": ["to_q", "to_v", "conv1"], "dtype": dtype, "checkpointing": checkpointing}
    small = build(net, {"student": Lora(2)}, storage=KEEPINGS[kind], **options)["student"]
    layers = {k.replace(".base_layer", ""): m for k, m in net.named_modules() if hasattr(m, "parametrizations")}
    assert len(layers) > 20
    for name, layer in layers.items():
        twin.get_submodule(name).weight.data = layer.weight.detach().clone()
    whole = build(twin, {"student": Lora(2)}, **options)["student"]
    for role in (small, whole):
        torch.manual_seed(1)
        for p in role.weights().values():
            p.data = torch.randn_like(p) * 0.1
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 10.0])
    return small, whole, inputs, torch.randn(2, 7, 16)


def gradients(role, inputs, words):
    role.zero_grad()
    x = inputs[0].clone().requires_grad_()
    out = role(x, inputs[1], encoder_hidden_states=words, return_dict=False)[0]
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in role.parameters())]


@kinds
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_learn_on_kept_weights_as_on_whole_ones_of_the_same_value(kind, checkpointing):
    small, whole, *given = on_base(kind, checkpointing)
    found, wanted = gradients(small, *given), gradients(whole, *given)
    assert len(found) > 10 and all(g is not None and g.abs().sum() > 0 for g in found)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_in_bfloat16_they_do_as_well():
    small, whole, *given = on_base("int8", dtype=torch.bfloat16)
    found, wanted = gradients(small, *given), gradients(whole, *given)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


def test_the_network_answers_to_the_tolerance_of_fp8():
    net = tiny_sd_pipeline().unet
    x, t, words = torch.randn(2, 4, 8, 8), torch.tensor([500, 10]), torch.randn(2, 7, 16)
    with torch.no_grad():
        before = net(x, t, encoder_hidden_states=words).sample
        after = kept(net, "fp8")(x, t, encoder_hidden_states=words).sample
    assert 0 < (after - before).norm() / before.norm() < 0.1


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_backward_is_left_notes_and_no_whole_weights(kind):
    """With the notes a forward leaves no more behind than on a network whose weights are there anyway; without, the weights."""
    layers = [nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)]
    net, x = nn.Sequential(*layers).requires_grad_(False), torch.randn(2, 8, requires_grad=True)

    def left():
        with Ledger() as ledger:
            before = ledger.hold([x, *net.parameters(), *net.buffers()])
            out = net(x)
            return ledger.held - before, out

    leaves, _ = left()
    kept(net, kind)
    without, _ = left()
    with noting(net):
        noted, _ = left()
    assert noted == leaves and without >= leaves + 64 * 64 * 4


def test_a_student_learns_on_a_kept_base_and_its_export_is_proved(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Preview, "__call__", lambda *_: None)
    (tmp_path / "prompts.txt").write_text("a red circle\nblue\n")
    teacher = str(save(MAKERS["sd"][0](), tmp_path / "teacher")), None
    wanted = config(teacher, str(tmp_path / "prompts.txt"), storage="nf4")
    before = {k: v.clone() for k, v in api.open_study(wanted).roles["teacher"].net.state_dict().items() if ".lora_" not in k}
    studies = []
    monkeypatch.setattr(api, "fit", lambda job, fit=api.fit, **o: (studies.append(job), fit(job, **o)))
    run = api.train(wanted, tmp_path / "run")
    after = studies[0].roles["teacher"].net.state_dict()
    assert all(torch.equal(v.view(torch.uint8), after[k].view(torch.uint8)) for k, v in before.items()), "the base moved"
    assert any(v.abs().sum() > 0 for k, v in run.weights.items() if "lora_B" in k), "the student did not"
    assert verify(run.export(tmp_path / "out")).ok
