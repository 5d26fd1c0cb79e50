"""Roles on one frozen base compute, and learn, exactly as separate networks would."""

import copy

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import Attention
from tiny import tiny_sd_pipeline, tiny_zimage_pipeline

from fewstep.families import FAMILIES
from fewstep.networks import Full, Lora, Role, attend, build, follow, parameter_bytes, set_weights

MAKERS = {"StableDiffusionPipeline": tiny_sd_pipeline, "ZImagePipeline": tiny_zimage_pipeline}
BOTH = {"student": Lora(4, alpha=8.0), "critic": Lora(4)}


@pytest.fixture(scope="module", params=MAKERS)
def family(request):
    return FAMILIES[request.param], getattr(MAKERS[request.param](), FAMILIES[request.param].component)


def roles_on(family, wanted=BOTH, **options):
    """Roles on a base of their own, whose adapters are no longer the identity they start as."""
    known, net = family
    roles = build(copy.deepcopy(net), wanted, lora_targets=known.lora_targets, **options)
    for i, role in enumerate(roles.values()):
        rng = torch.Generator().manual_seed(i)
        for p in role.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return roles


def apart(family, roles):
    """The same roles without sharing: a base each, nothing recomputed."""
    known, net = family
    own = {name: build(copy.deepcopy(net), {name: BOTH[name]}, lora_targets=known.lora_targets)[name] for name in BOTH}
    for name, role in own.items():
        set_weights(role, roles[name].weights())
    return {"teacher": build(copy.deepcopy(net), {}, lora_targets=())["teacher"], **own}


def inputs(n=3):
    rng = torch.Generator().manual_seed(7)
    x, y = (torch.randn(n, 4, 8, 8, generator=rng) for _ in range(2))
    return x, y, torch.randn(n, 5, 16, generator=rng)


def caller(family):
    """(role, x, words) -> output: the network as its family calls it, at a fixed time."""
    known, _ = family
    time = torch.full((3,), 0.4 if known.component == "transformer" else 400.0)

    def call(role, x, words):
        from fewstep.denoiser import Cond

        return known.call(role, x, time, Cond({"prompt": words, "length": torch.tensor([5, 4, 3])}))

    return call


def game(family, roles):
    """A loss over every role in mixed order: graphs of student and critic are interleaved, and the critic speaks last."""
    call, (x, y, words) = caller(family), inputs()
    first = call(roles["student"], x, words)
    with torch.no_grad():
        real = call(roles["teacher"], first.detach(), words)
    fake = call(roles["critic"], first, words)  # its gradient flows into the student through its input
    second = call(roles["student"], y, words)
    with torch.no_grad():
        real = real + call(roles["teacher"], y, words)
    last = call(roles["critic"], y, words)
    return (fake - real).square().mean() + (second * first).mean() + (last * second).mean()


def gradients(loss, roles):
    loss.backward()
    return {f"{n}.{k}": p.grad.clone() for n in BOTH for k, p in roles[n].weights().items()}


def gap(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max() / b[k].abs().max().clamp_min(1e-3)) for k in a)


def test_a_shared_base_gives_the_gradients_of_separate_networks(family):
    shared = roles_on(family, checkpointing=True)
    separate = apart(family, shared)
    ours, theirs = game(family, shared), game(family, separate)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    found, wanted = gradients(ours, shared), gradients(theirs, separate)
    assert all(float(v.abs().max()) > 0 for v in wanted.values())
    assert gap(found, wanted) < 1e-5


def test_checkpointing_really_recomputes(family):
    call, (x, _, words) = caller(family), inputs()

    def passes(checkpointing):
        roles, count = roles_on(family, checkpointing=checkpointing), []
        for name, layer in roles["student"].net.named_modules():
            if name.endswith("lora_A.student"):
                layer.register_forward_hook(lambda *_: count.append(1))
        call(roles["student"], x, words).sum().backward()
        return len(count)

    assert passes(True) > passes(False)


def test_the_stock_checkpointing_function_is_wrong_here(family):
    """Why networks.py brings its own: Diffusers' recomputes a block under whichever adapter ran last, and says nothing."""
    shared = roles_on(family)
    shared["teacher"].net.enable_gradient_checkpointing()
    separate = apart(family, shared)
    assert gap(gradients(game(family, shared), shared), gradients(game(family, separate), separate)) > 1e-2


def test_the_teacher_is_the_bare_network_whatever_its_adapters_learn(family):
    call, (x, _, words) = caller(family), inputs()
    known, net = family
    with torch.no_grad():
        bare = known.call(net, x, torch.full((3,), 0.4 if known.component == "transformer" else 400.0), _cond(words))
        roles = build(copy.deepcopy(net), BOTH, lora_targets=known.lora_targets)
        at_start = {name: call(role, x, words) for name, role in roles.items()}
    for name in BOTH:
        torch.testing.assert_close(at_start[name], bare, rtol=0, atol=1e-6)  # a new adapter is the identity
    optimizer = torch.optim.AdamW([p for n in BOTH for p in roles[n].parameters()], lr=0.1)
    game(family, roles).backward()
    optimizer.step()
    with torch.no_grad():
        after = {name: call(role, x, words) for name, role in roles.items()}
    assert torch.equal(at_start["teacher"], bare) and torch.equal(after["teacher"], bare)
    assert all(float((after[name] - bare).abs().max()) > 1e-3 for name in BOTH)


def _cond(words):
    from fewstep.denoiser import Cond

    return Cond({"prompt": words, "length": torch.tensor([5, 4, 3])})


@pytest.mark.parametrize("wanted", [BOTH, {"student": Full(), "critic": Lora(2)}, {"student": Full(), "critic": Full()}])
def test_a_role_trains_its_own_parameters_alone(family, wanted):
    roles = roles_on(family, wanted)
    own = {name: {p.data_ptr() for p in role.parameters()} for name, role in roles.items()}
    assert own["teacher"] == set()
    assert own["student"] and own["critic"] and not own["student"] & own["critic"]
    base = {p.data_ptr() for k, p in roles["teacher"].net.named_parameters() if ".lora_" not in k}
    assert not base & (own["student"] | own["critic"])
    assert not any(p.requires_grad for k, p in roles["teacher"].net.named_parameters() if ".lora_" not in k)
    assert all(p.requires_grad for name in wanted for p in roles[name].parameters())


def test_one_base_in_memory_instead_of_three(family):
    _, net = family
    base = sum(p.numel() * p.element_size() for p in net.parameters())
    roles = roles_on(family)
    adapters = sum(p.numel() * p.element_size() for name in BOTH for p in roles[name].parameters())
    assert parameter_bytes(roles.values()) == base + adapters
    assert parameter_bytes(roles_on(family, {"student": Full(), "critic": Full()}).values()) == 3 * base


def test_adapters_and_copies_stay_float32_on_a_bfloat16_base(family):
    call, (x, _, words) = caller(family), inputs()
    roles = roles_on(family, {"student": Lora(4), "critic": Full()}, dtype=torch.bfloat16)
    assert {p.dtype for k, p in roles["teacher"].net.named_parameters() if ".lora_" not in k} == {torch.bfloat16}
    for name in ("student", "critic"):
        assert {p.dtype for p in roles[name].parameters()} == {torch.float32}
        call(roles[name], x, words).float().square().mean().backward()
        grads = [p.grad for p in roles[name].parameters() if p.grad is not None]
        assert {g.dtype for g in grads} == {torch.float32} and all(bool(g.isfinite().all()) for g in grads)
        assert any(bool((g != 0).any()) for g in grads)


def test_the_scale_of_an_adapter_is_alpha_over_rank(family):
    call, (x, _, words) = caller(family), inputs()
    with torch.no_grad():
        strong, plain = (roles_on(family, {"student": Lora(4, alpha=a)})["student"] for a in (8.0, None))
        for key, p in plain.weights().items():
            p.copy_(strong.weights()[key] * (2 if ".lora_B." in key else 1))
        torch.testing.assert_close(call(strong, x, words), call(plain, x, words), rtol=1e-5, atol=1e-6)


def test_the_seed_makes_the_adapter(family):
    known, net = family
    made = [
        build(copy.deepcopy(net), {"student": Lora(2)}, lora_targets=known.lora_targets, seed=s)["student"].weights()
        for s in (0, 0, 1)
    ]
    key = next(k for k in made[0] if ".lora_A." in k)
    assert torch.equal(made[0][key], made[1][key]) and not torch.equal(made[0][key], made[2][key])


def test_weights_of_other_names_are_refused(family):
    roles = roles_on(family)
    with pytest.raises(ValueError, match=r"stored critic has other weights than this config makes \(.*\); use the config"):
        set_weights(roles["critic"], {f"{k}.other": v for k, v in roles["critic"].weights().items()})
    fewer = dict(list(roles["student"].weights().items())[1:])
    with pytest.raises(ValueError, match="stored student has other weights"):
        set_weights(roles["student"], fewer)


def test_targets_that_match_no_layer_are_refused(family):
    _, net = family
    with pytest.raises(ValueError, match="no layer of .* matches the LoRA targets \\['to_x'\\]"):
        build(copy.deepcopy(net), {"student": Lora(2)}, lora_targets=["to_x"])


def test_a_role_hides_what_it_borrows():
    net = torch.nn.Linear(2, 2)
    assert list(Role("teacher", net, owns=False, dtype=torch.float32).state_dict()) == []
    assert sorted(Role("student", net, owns=True, dtype=torch.float32).state_dict()) == ["bias", "weight"]


@pytest.mark.parametrize("wanted", [BOTH | {"student": Lora(4)}, {"student": Full(), "critic": Full()}])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_follower_goes_a_share_of_the_way(family, wanted, share):
    """None of it changes nothing, all of it is a copy; the leader stays where it is."""
    roles = roles_on(family, wanted)
    before = {n: {k: p.detach().clone() for k, p in roles[n].weights().items()} for n in wanted}
    follow(roles["critic"], roles["student"], share)
    for key, p in roles["critic"].weights().items():
        own, leader = before["critic"][key], before["student"][key]
        torch.testing.assert_close(p.detach(), own + share * (leader - own))
        assert torch.equal(roles["student"].weights()[key], leader)


@pytest.fixture
def backends(monkeypatch):
    """Diffusers' backends as if all that they need were here; the one in use is as before when a test is over."""
    monkeypatch.setattr(attention_dispatch, "_check_attention_backend_requirements", lambda backend: None)
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)


def test_xformers_reaches_every_layer_that_attends(family, backends, monkeypatch):
    told = []
    monkeypatch.setattr(Attention, "set_use_memory_efficient_attention_xformers", lambda self, use: told.append(self))
    roles = roles_on(family)
    attend(roles.values(), "xformers")
    layers = [m for m in roles["teacher"].net.modules() if hasattr(m, "processor")]
    known = [m for m in layers if getattr(m.processor, "_attention_backend", None) == "xformers"]
    assert layers and {id(m) for m in layers} == {id(m) for m in [*known, *told]}


def test_a_backend_that_no_layer_hears_of_is_refused(family, backends):
    roles = roles_on(family).values()
    if family[0].component == "transformer":
        return attend(roles, "flash")
    with pytest.raises(ValueError, match="UNet2DConditionModel cannot be told to.*; sdpa always does"):
        attend(roles, "flash")
