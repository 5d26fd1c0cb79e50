"""Heads that look at decoded pictures through any image tower, with a gradient all the way back to the latents."""

import pytest
import torch
from tiny import save
from tiny.video import tiny_ltx_pipeline
from torch import nn
from toys import NOTHING

from fewstep import api
from fewstep.adapters import load_teacher
from fewstep.config import parse
from fewstep.heads import Heads
from fewstep.pixels import Pixels, open_pixels
from fewstep.plan import plan
from fewstep.study import study_of
from fewstep.taps import taps_of


class Tower(nn.Module):
    """Two stages of maps, or of tokens behind one for the class."""

    def __init__(self, tokens):
        super().__init__()
        self.layer1, self.layer2, self.tokens = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 10, 3, 2, 1), tokens
        self.sequence = nn.Identity()

    def forward(self, x):
        x = self.layer2(self.layer1(x).relu())
        if self.tokens:
            x = self.sequence(torch.cat([x.flatten(2).mean(2, keepdim=True), x.flatten(2)], 2).transpose(1, 2))
        return x.flatten(1).mean(1)


def eyes(tokens=False, size=16, decoder=None):
    decode = decoder or (lambda x: x.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :3])
    return Pixels(decode, decoder, Tower(tokens), size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_every_block_is_measured_and_stages_are_found():
    net = eyes()
    assert net.widths == {"visual.layer1": 6, "visual.layer2": 10} and net.stages == ("visual.layer1", "visual.layer2")
    assert Heads("pixel").taps_on(net).widths == (6, 10)
    net.widths = {f"visual.transformer.resblocks.{i}": 8 for i in range(12)}
    assert [name.split(".")[-1] for name in net.stages] == ["2", "5", "8", "11"]  # ADD's, of a ViT-S
    net.widths = {"visual.trunk": 4}
    with pytest.raises(ValueError, match=r"the stages of this feature network are not known; name some of: visual\.trunk"):
        Heads("pixel").taps_on(net)


def test_the_tower_sees_pictures_as_it_was_trained_to():
    """[-1, 1] becomes [0, 1], then the tower's own size, mean and deviation."""
    net, seen = eyes(size=8), []
    net.visual.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    net(torch.full((2, 3, 4, 4), 0.6))
    assert seen[0].shape == (2, 3, 8, 8)
    torch.testing.assert_close(seen[0], torch.full((2, 3, 8, 8), 0.6))  # ((0.6 / 2 + 0.5) - 0.5) / 0.5


def test_tokens_become_the_map_that_they_were():
    net = eyes(tokens=True)
    taps = taps_of(net, ("visual.layer2", "visual.sequence"))
    found = {}
    for name, block in taps.blocks.items():
        block.register_forward_hook(lambda module, args, out, name=name: found.__setitem__(name, out))
    x = torch.randn(2, 3, 4, 4)
    net(x)
    as_map, as_tokens = taps.read(found, x, NOTHING)
    assert taps.widths == (10, 10) and torch.equal(as_map, as_tokens)


def test_only_the_latents_get_a_gradient():
    net = eyes(decoder=nn.Conv2d(4, 3, 3, padding=1))
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    net(x).sum().backward()
    assert float(x.grad.abs().max()) > 0
    assert all(not p.requires_grad for p in net.parameters()) and len(list(net.decoder.parameters())) == 2


def config(**objective):
    tree = {"name": "adversarial", "heads": "pixel", "inner": {"name": "dmd", "steps": 1, "critic_turns": 1}, **objective}
    return parse({"teacher": {"path": "zoo:sprites-sd"}, "objective": tree, "data": {"images": "zoo:sprites"}})


def test_a_config_trains_heads_on_pixels_of_the_zoos_own_tower():
    study = api.open_study(config())
    nets, heads = study.nets(study.roles), study.roles["heads"]
    x = torch.randn(2, *study.teacher.latent_shape, requires_grad=True)
    logits = nets.judge.logits(x, torch.zeros(2, dtype=torch.float64), study.teacher.encode(["a red circle", "a star"]))
    logits.mean().backward()
    assert logits.shape == (2, 4) and float(x.grad.abs().max()) > 0
    assert all(p.grad is not None for p in heads.parameters())
    assert not list(study.roles["pixels"].parameters()) and all(p.grad is None for p in study.teacher.pipe.vae.parameters())
    assert set(plan(config())["trained parameters"]) == {"student", "critic", "heads"}


def test_a_feature_network_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="names no open_clip model; use zoo:sprites-clip"):
        open_pixels("dino", lambda x: x, None)


def test_a_teacher_of_videos_is_refused_before_anything_is_trained(tmp_path):
    teacher = load_teacher(str(save(tiny_ltx_pipeline(), tmp_path)), size=(9, 32, 64))
    with pytest.raises(ValueError, match="pixel heads look at pictures, and this teacher draws videos; use dmd2, ladd"):
        study_of(config(), teacher)
