"""Features are those of the network's own forward, taken by hooks that leave nothing behind."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from tiny import tiny_ddpm_pipeline, tiny_flux2_pipeline, tiny_sd_pipeline, tiny_zimage_pipeline
from torch import nn
from toys import NOTHING

from fewstep.denoiser import Cond, Denoiser
from fewstep.families import FAMILIES
from fewstep.heads import KINDS, Discriminator, Forked, Heads, averaged, tokenwise, whole
from fewstep.networks import Full, Lora, build, heads_role
from fewstep.taps import Taps, tapped, taps_of

MAKERS = {"StableDiffusionPipeline": tiny_sd_pipeline, "ZImagePipeline": tiny_zimage_pipeline, "DDPMPipeline": tiny_ddpm_pipeline}
LATENT = [name for name, kind in KINDS.items() if kind.backbone != "pixels" and kind.eyes == 1]
LAST = {"StableDiffusionPipeline": "up_blocks.0", "ZImagePipeline": "all_final_layer.2-1", "DDPMPipeline": "up_blocks.0"}
T = torch.tensor([0.4, 0.7], dtype=torch.float64)


@pytest.fixture(scope="module", params=MAKERS)
def family(request):
    pipe = MAKERS[request.param]()
    return request.param, FAMILIES[request.param], pipe


def players(family, kind="dmd2", wanted=None, size=(8, 8), **options):
    """(roles with heads, (role, x, t) -> the judge's arguments, the judge on a role)."""
    _, known, pipe = family
    roles = build(
        copy.deepcopy(getattr(pipe, known.component)),
        wanted or {"student": Lora(2), "critic": Lora(2)},
        lora_targets=known.lora_targets,
        **options,
    )
    for i, role in enumerate(roles.values()):  # away from the identity that adapters start as
        rng = torch.Generator().manual_seed(i)
        for p in role.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=rng)
    roles["heads"] = heads_role(roles, Heads(kind), seed=0)
    make = partial(Denoiser, schedule=known.schedule(pipe.scheduler), target=known.target(pipe.scheduler), call=known.call)
    net = roles["teacher"].net
    rng = torch.Generator().manual_seed(7)
    words = torch.randn(2, 5, 16, generator=rng)
    cond = Cond({"prompt": words, "length": torch.tensor([5, 4]), "label": torch.zeros(2, dtype=torch.long)})
    x = torch.randn(2, net.config["in_channels"], *size, generator=rng)

    def judge(name="critic", wrap=lambda role: role):
        return Discriminator(make(wrap(roles[name])), Heads(kind).taps_on(roles[name].net), roles["heads"])

    return roles, (x, T, cond), judge


def counted(module):
    """The module's calls so far."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_points_beside_their_origin_are_seen_as_alone_and_from_one_pass(family):
    """Lightning's D(x_t, x_s, t, s, c): both points' features side by side, the origin's the same for every landing."""
    roles, (x, t, cond), judge = players(family, "beside")
    places = [(x, t), (0.5 * x, t / 2), (x.flip(0), t.flip(0))]
    plain = Discriminator(judge().denoiser, judge().taps, lambda maps: torch.cat([m.flatten(1) for m in maps], 1))
    own, passes = [plain.logits(*place, cond) for place in places], []
    assert all((a - b).abs().max() > 1e-4 for a, b in pairwise(own))
    hook = roles["critic"].net.register_forward_pre_hook(lambda *_: passes.append(1))
    found, alone = plain.beside(places[:2], places[2], cond), plain.beside(places[:2], None, cond)
    hook.remove()
    assert len(passes) == 2
    for k in (0, 1):
        torch.testing.assert_close(found[k], torch.cat([own[k], own[2]], 1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone[k], own[k], rtol=1e-5, atol=1e-5)
    assert [logits.shape for logits in judge().beside(places[:2], places[2], cond)] == [(2, 1)] * 2


@pytest.mark.parametrize("kind", LATENT)
def test_an_early_exit_sees_what_a_whole_pass_sees(family, kind):
    roles, inputs, judge = players(family, kind)
    beyond = counted(roles["critic"].net.get_submodule(LAST[family[0]]))
    logits = judge().logits(*inputs)
    assert not beyond  # it ran no further than its last tap
    prediction, again = judge().both(*inputs)
    assert len(beyond) == 1
    plain = judge().denoiser(*inputs)
    assert torch.equal(logits, again) and logits.dtype == torch.float32 and logits.shape[0] == 2
    assert torch.equal(prediction.x0, plain.x0) and torch.equal(prediction.eps, plain.eps)
    assert not torch.equal(judge("teacher").logits(*inputs), logits)  # each role's own features


@pytest.mark.parametrize("kind", LATENT)
def test_a_score_beside_features_leaves_no_graph_beyond_the_taps(family, kind):
    _, (x_t, t, cond), judge = players(family, kind)
    x_t = x_t.clone().requires_grad_()
    whole, logits = judge().both(x_t, t, cond)
    score, again = judge().both(x_t, t, cond, graph=False)
    assert torch.equal(whole.x0, score.x0) and torch.equal(logits, again)
    assert whole.x0.requires_grad and again.requires_grad and not score.x0.requires_grad and torch.is_grad_enabled()
    slopes = [torch.autograd.grad(found.sum(), x_t)[0] for found in (logits, again)]
    assert torch.equal(*slopes) and slopes[0].abs().max() > 0


def test_a_pass_leaves_no_hook_behind(family):
    roles, inputs, judge = players(family)

    def hooks():
        return sum(len(m._forward_hooks) for m in roles["critic"].net.modules())

    before = hooks()
    judge().logits(*inputs)
    judge().both(*inputs)
    with pytest.raises(RuntimeError):
        judge().logits(inputs[0][:, :1], *inputs[1:])  # the network itself fails
    assert hooks() == before


@pytest.mark.parametrize("kind", ["dmd2", "ladd"])
def test_checkpointing_gives_the_same_gradients_through_an_early_exit(family, kind):
    """The student runs between forward and backward, so that a recomputation under the wrong role would show."""

    def gradients(checkpointing):
        roles, (x, t, cond), judge = players(family, kind, checkpointing=checkpointing)
        x = x.clone().requires_grad_()
        logits = judge().logits(x, t, cond)
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None  # nothing keeps packing what others save
        (logits.square().mean() + judge("student").denoiser(x, t, cond).x0.mean()).backward()
        return [x.grad, *(p.grad for r in ("critic", "heads") for p in roles[r].parameters() if p.grad is not None)]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed) > 3 and all(float(g.abs().max()) > 0 for g in plain[:1])
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


class Wrapper(nn.Module):
    """What DistributedDataParallel does with a module, as far as an early exit can disturb it: work after the forward."""

    def __init__(self, module):
        super().__init__()
        self.module, self.ended = module, 0

    def forward(self, *args, **kwargs):
        out = self.module(*args, **kwargs)
        self.ended += 1
        return out


def test_a_wrapped_role_ends_its_forward_in_order(family):
    _, inputs, judge = players(family)
    wrapped: list[Wrapper] = []
    plain, through = judge(), judge(wrap=lambda role: wrapped.append(Wrapper(role)) or wrapped[-1])
    assert torch.equal(through.logits(*inputs), plain.logits(*inputs))
    assert wrapped[0].ended == 1


@pytest.mark.parametrize("kind", LATENT)
@pytest.mark.parametrize("size", [(8, 8), (16, 16), (8, 16)])
def test_heads_judge_latents_of_any_size(family, kind, size):
    """T22."""
    _, inputs, judge = players(family, kind, size=size)
    logits = judge("teacher").logits(*inputs)
    assert logits.isfinite().all() and logits.ndim == 2
    if kind != "ladd":
        assert logits.shape[1] == 1


@pytest.mark.parametrize("head", [whole, averaged, tokenwise])
@pytest.mark.parametrize("size", [(8, 8), (12, 12), (32, 32), (16, 24)])
def test_heads_look_at_all_of_a_map_of_any_size(head, size):
    """T22: a logit a map, or one a token, to which every place of the map adds; of several taps, side by side."""
    heads = Forked([head(width) for width in (16, 80)])
    maps = [torch.randn(2, width, *size, requires_grad=True) for width in (16, 80)]
    logits = heads(maps)
    assert logits.shape == (2, 2 * (size[0] * size[1] if head is tokenwise else 1)) and logits.isfinite().all()
    assert ((logits[0] - logits[1]).unflatten(0, (2, -1)).abs().amax(1) > 1e-3).all()
    for slope in torch.autograd.grad(logits.square().sum(), maps):
        assert (slope.abs().amax(1) > 0).all()


def test_a_token_has_a_logit_of_its_own(family):
    _, inputs, judge = players(family, "ladd")
    k = judge("teacher").logits(*inputs).shape[1]
    assert k == {"StableDiffusionPipeline": 3 * 16, "DDPMPipeline": 3 * 16, "ZImagePipeline": 16}[family[0]]


@pytest.mark.parametrize("wanted", [{"critic": Full()}, {"critic": Lora(2)}])
def test_bfloat16_features_are_judged_in_float32(family, wanted):
    _, inputs, judge = players(family, wanted={"student": Lora(2), **wanted}, dtype=torch.bfloat16)
    logits = judge().logits(*inputs)
    assert logits.dtype == torch.float32
    logits.mean().backward()


def test_no_teachers_weight_gets_a_gradient_and_the_sample_does(family):
    roles, (x, t, cond), judge = players(family, "ladd")
    x.requires_grad_()
    judge("teacher").logits(x, t, cond).mean().backward()
    assert float(x.grad.abs().max()) > 0
    assert all(p.grad is None for name, role in roles.items() if name != "heads" for p in role.net.parameters())


def test_the_seed_makes_the_heads(family):
    _, known, pipe = family
    net = getattr(pipe, known.component)
    first, again, other = (Heads("ladd").build(net, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_a_tap_that_is_not_there_is_refused_with_those_that_are():
    net = tiny_sd_pipeline().unet
    with pytest.raises(
        ValueError, match=r"taps: UNet2DConditionModel has no block 'middle'; there are: .*down_blocks\.0.*mid_block"
    ):
        taps_of(net, ("middle",))
    with pytest.raises(ValueError, match="the width of block 'time_embedding' cannot be told"):
        taps_of(net, ("time_embedding",))


def test_an_error_inside_a_block_comes_out_as_itself():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 2))
    with pytest.raises(RuntimeError), tapped({"a": net[1]}, "stop"):
        net(torch.zeros(1, 2))
    assert not net[1]._forward_hooks


def test_the_frames_of_a_video_are_one_tall_map():
    tokens = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(1, 3 * 4 * 2, 6)  # 3 frames of 4x2 tokens
    (found,) = Taps({"block": torch.nn.Identity()}, (6,), patch=2).read({"block": tokens}, torch.zeros(1, 4, 3, 8, 4), NOTHING)
    assert found.shape == (1, 6, 12, 2) and torch.equal(found[0, :, 7, 1], tokens[0, 15])


@pytest.mark.parametrize("lengths", [None, (3, 1)])
def test_the_image_behind_the_text_is_read_where_it_lies(lengths):
    words, image = torch.zeros(2, 3, 6), torch.arange(2 * 4 * 6, dtype=torch.float32).view(2, 4, 6)
    rows = [torch.cat([words[i, : n or 3], image[i], words[i, n or 3 :]]) for i, n in enumerate(lengths or (3, 3))]
    cond = Cond({"prompt": words} | ({"length": torch.tensor(lengths)} if lengths else {}))
    taps = Taps({"block": torch.nn.Identity()}, (6,), text_first=True)
    (found,) = taps.read({"block": torch.stack(rows)}, torch.zeros(2, 4, 2, 2), cond)
    assert torch.equal(found.flatten(2).transpose(1, 2), image)


def test_flux2s_image_is_what_its_last_layer_is_given():
    known = FAMILIES["Flux2Pipeline"]
    net, x, given = tiny_flux2_pipeline().transformer, torch.randn(2, 16, 2, 3), []
    cond = Cond({"prompt": torch.randn(2, 5, 24), "guidance": torch.ones(2)})
    net.norm_out.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    taps = taps_of(net, ("single_transformer_blocks.0",))
    with torch.no_grad(), tapped(taps.blocks) as found:
        known.call(net, x, T.float(), cond)
    assert torch.equal(taps.read(found, x, cond)[0].flatten(2).transpose(1, 2), given[0])
