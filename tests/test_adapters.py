"""A Denoiser and a step walk where the stock pipeline walks, for every family."""

import copy
import inspect
from dataclasses import replace
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import MAKERS, tiny_vae

from fewstep.experts import Relay
from fewstep.families import make_scheduler
from fewstep.sampling import STEPS, rollout
from fewstep.stream import stream

EMBEDDED = ("flux", "flux2")  # one pass: the guidance that is fed has a test of its own
UNLED = ("dit", "ddpm")  # pipelines that draw their latents themselves
FROM_WORDS = [name for name in MAKERS if name not in UNLED]
GUIDED = [(name, g) for name in FROM_WORDS for g in (1.0, 4.0) if g == 1 or name not in EMBEDDED]
HANDED_ON = ("sd", "sd21", "sdxl", "pixart", "sana")  # pipelines that hand their scheduler the call's generator
NOISED = (*HANDED_ON, "sd3", "flux", "flux2", "klein", "qwen", "zimage", "lumina2", "ltx")
WORDS = ["a red circle", "a small blue square left of a star"]


class Times:
    """Notes the times that a network is fed."""

    def __init__(self, net):
        self.seen, self.net = [], net

    def __enter__(self):
        def note(module, args, kwargs):
            time = args[1] if len(args) > 1 else kwargs.get("timestep", kwargs.get("t"))
            self.seen.append(torch.as_tensor(time).double().flatten()[0].item())

        nets = list(self.net.children()) if isinstance(self.net, Relay) else [self.net]
        self.hooks = [net.register_forward_pre_hook(note, with_kwargs=True) for net in nets]
        return self.seen

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


class Draws:
    """A step's noise as the stock schedulers draw it: in the layout of the latents that a pipeline shows."""

    def __init__(self, seed, teacher, shown):
        self.generator, self.teacher, self.shown = torch.Generator().manual_seed(seed), teacher, shown

    def normal_like(self, x):
        noise = torch.randn(self.shown.shape, generator=self.generator, dtype=x.dtype)
        places = seen(self.teacher, torch.arange(x.numel()).reshape(x.shape), self.shown)
        found = torch.empty(x.numel(), dtype=x.dtype)
        found[places.flatten()] = noise.flatten()
        return found.reshape(x.shape)


def ours(teacher, noise, times, sampler="ddim", guidance=1.0, rng=None, words=WORDS, made_at=None):
    """(every latent, the times fed) of our own walk; made_at: of whose size the conditions are, which then are resized."""
    made_at = made_at or teacher
    denoiser = teacher.guided(teacher.net, guidance, made_at.null())
    cond = teacher.resized(made_at.encode(words))
    with torch.no_grad(), Times(teacher.net) as seen:
        visits = list(rollout(denoiser, noise, times, cond, step=STEPS[sampler], rng=rng or stream(0, 0, 0, 0)))
    return [v.x_s for v in visits], seen


def deployed(teacher, sampler):
    """The teacher's own pipeline with the scheduler of a student."""
    pipe = copy.copy(teacher.pipe)
    pipe.register_modules(scheduler=teacher.scheduler(sampler))
    return pipe


def stock(teacher, noise, steps, sampler="ddim", guidance=1.0, seed=0):
    """The same of the pipeline that will be deployed, with nothing of ours in it but the scheduler's config.

    noise: None leaves it to the pipeline's own generator; seed: None leaves the generator away, too."""
    latents = []

    def collect(pipe, index, time, values):
        latents.append(values["latents"].clone())
        return {}

    def collect_old(index, time, values):
        latents.append(values.clone())

    pipe = deployed(teacher, sampler)
    call = teacher.call(guidance)
    old = "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters
    call |= {"callback": collect_old} if old else {"callback_on_step_end": collect}
    call |= {k: [v] * len(WORDS) for k, v in call.items() if k == "negative_prompt"}
    with Times(teacher.net) as seen:
        pipe(
            prompt=list(WORDS),  # ZImagePipeline writes its chat template into the list it is given
            num_inference_steps=steps,
            **call,
            latents=None if noise is None else teacher.family.pack(noise).clone(),
            **teacher.family.spacing(sampler, steps),
            generator=None if seed is None else torch.Generator().manual_seed(seed),
            output_type="latent",
        )
    return latents, seen


def seen(teacher, x, like):
    """x as a pipeline's callback shows it: FLUX.2's take maps and show tokens."""
    packed = teacher.family.pack(x)
    return packed if packed.ndim == like.ndim else packed.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("steps", [1, 4, 8])  # DDIMScheduler itself steps beside its grid where 1000 is no multiple of the count
@pytest.mark.parametrize(("name", "guidance"), GUIDED)
def test_every_latent_is_the_pipelines_own(teachers, name, steps, guidance):
    teacher = teachers[name]
    noise = torch.randn(2, *teacher.latent_shape)
    theirs, fed = stock(teacher, noise, steps, guidance=guidance)
    found, times = ours(teacher, noise, teacher.grid(steps, "ddim"), guidance=guidance)
    assert len(found) == len(theirs) == steps
    for a, b in zip(found, theirs, strict=True):
        # Of the largest: where alpha is 0.006 guided latents are hundreds, and what is left of them is rounded by as much.
        torch.testing.assert_close(seen(teacher, a, b), b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.abs().max())))
    assert times == pytest.approx(list(dict.fromkeys(fed)), rel=1e-6, abs=1e-6)  # some pipelines guide in two passes


@pytest.mark.parametrize("name", FROM_WORDS)
def test_at_another_shape_it_is_the_pipelines_walk_at_that_shape(teachers, name):
    """Wide and tall: conditions made for the teacher's own size are resized, and the null condition takes their size."""
    sizes = [size for size in teachers[name].sizes(4.0)[1:] if not any(side % 16 for side in size[-2:])]  # as pipelines want it
    for size in {sizes[0], sizes[-1]}:
        teacher = teachers[name].at(size)
        noise = torch.randn(2, *teacher.latent_shape)
        guidance = 1.0 if name in EMBEDDED else 4.0
        theirs, _ = stock(teacher, noise, 2, guidance=guidance)
        found, _ = ours(teacher, noise, teacher.grid(2, "ddim"), guidance=guidance, made_at=teachers[name])
        for a, b in zip(found, theirs, strict=True):
            torch.testing.assert_close(seen(teacher, a, b), b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("name", FROM_WORDS)
def test_one_seed_gives_one_picture_here_and_in_the_stock_pipeline(teachers, name):
    """Pictures of a deterministic sampler, from the noise that the pipeline's own generator draws; see UNLED for the others."""
    teacher = teachers[name]
    theirs, _ = stock(teacher, None, 2, seed=11)
    shape = (2, *teacher.latent_shape)
    rng = torch.Generator().manual_seed(11)
    # CogVideoX alone draws its frames before its channels.
    drawn = teacher.family.pack(torch.zeros(shape)).shape if name == "cogvideox" else shape
    noise = torch.randn(drawn, generator=rng)
    found, _ = ours(teacher, noise.transpose(1, 2) if name == "cogvideox" else noise, teacher.grid(2, "ddim"))
    last = theirs[-1]
    torch.testing.assert_close(seen(teacher, found[-1], last), last, rtol=1e-5, atol=1e-5 * max(1.0, float(last.abs().max())))


@pytest.mark.parametrize(("name", "steps"), [("sd", 1), ("sd", 2), ("zimage", 1), *((name, 4) for name in NOISED)])
def test_renoise_is_the_lcm_schedulers_walk(teachers, name, steps):
    """One seed gives one picture: the call's generator's where the pipeline hands it on, else that of torch itself."""
    teacher = teachers[name]
    noise = torch.randn(2, *teacher.latent_shape)
    torch.manual_seed(3)
    theirs, fed = stock(teacher, noise, steps, "renoise", seed=3 if name in HANDED_ON else None)
    found, times = ours(teacher, noise, teacher.grid(steps, "renoise"), "renoise", rng=Draws(3, teacher, theirs[0]))
    # LCMScheduler's c_skip and c_out are off the boundary's 0 and 1 by up to 1e-5 of x_t at the smallest deployed time.
    for a, b in zip(found, theirs, strict=True):
        torch.testing.assert_close(seen(teacher, a, b), b, rtol=1e-4, atol=1e-4)
    assert times == pytest.approx(fed, rel=1e-6, abs=1e-6)


def test_families_put_noise_back_where_their_pipelines_can(teachers):
    offered = {name: list(teachers[name].family.samplers) for name in MAKERS}
    first = {name for name in MAKERS if offered[name] == ["renoise", "ddim"]}
    assert first == {"sd", "sd21", "sdxl", "pixart"}
    assert {name for name in MAKERS if offered[name] == ["ddim", "renoise"]} == {*NOISED, "dit"} - first
    assert {name for name in MAKERS if offered[name] == ["ddim"]} == {"wan", "wan22", "cogvideox", "ddpm"} & {*MAKERS}


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize(("name", "guidance"), [("ddpm", 1.0), ("dit", 1.0), ("dit", 4.0)])
def test_what_a_pipeline_draws_from_its_own_latents_is_ours(teachers, name, steps, guidance):
    teacher, fed_x = teachers[name], []
    kind = getattr(diffusers, teacher.family.deployed or type(teacher.pipe).__name__)
    parts = {k: v for k, v in teacher.pipe.components.items() if k != "scheduler"}
    pipe = kind(**parts, scheduler=teacher.scheduler("ddim"))
    pipe.set_progress_bar_config(disable=True)
    words, call = list(teacher.family.examples), {**teacher.call(guidance), "num_inference_steps": steps}
    note = teacher.net.register_forward_pre_hook(lambda module, args: fed_x.append(args[0][:2].clone()))
    with Times(teacher.net) as fed:
        asked = teacher.family.ask(teacher.pipe, words)
        theirs = pipe(**asked, **call, generator=torch.Generator().manual_seed(5), output_type="np").images
    note.remove()
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(5))
    found, times = ours(teacher, noise, teacher.grid(steps, "ddim"), guidance=guidance, words=words)
    for a, b in zip([noise, *found], fed_x, strict=False):  # the network sees every latent but the last, which is decoded
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.abs().max())))
    assert len(fed_x) == len(found) == steps
    np.testing.assert_allclose(teacher.decode(found[-1]).permute(0, 2, 3, 1).numpy(), theirs, atol=1e-5)
    assert times == pytest.approx(fed, abs=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_the_grid_falls_from_pure_noise(teachers, name):
    teacher = teachers[name]
    for sampler in teacher.family.samplers:
        for steps in (1, 2, 4):
            grid = teacher.grid(steps, sampler)
            assert len(grid) == steps and grid[0] == 1.0
            assert all(a > b > 0 for a, b in pairwise(grid))


@pytest.mark.parametrize(
    ("name", "sampler", "steps"),
    [("sd", "ddim", 0), ("sd", "ddim", 1001), ("sd", "renoise", 101), ("zimage", "ddim", 0), ("ddpm", "ddim", 2000)],
)
def test_a_grid_that_no_scheduler_makes_is_refused(teachers, name, sampler, steps):
    with pytest.raises(ValueError, match="choose another step count") as refused:
        teachers[name].grid(steps, sampler)
    assert "\n" not in str(refused.value)


def test_a_sampler_without_a_stock_scheduler_is_refused(teachers):
    teacher = teachers["wan"]
    with pytest.raises(ValueError, match="no stock scheduler of this family computes the sampler 'renoise'; it has: ddim"):
        make_scheduler(teacher.family, teacher.pipe.scheduler.config, "renoise")


@pytest.mark.parametrize("name", FROM_WORDS)
def test_pictures_are_decoded_as_the_pipeline_decodes_them(teachers, name):
    teacher = teachers[name]
    noise = torch.randn(2, *teacher.latent_shape)
    latents, _ = ours(teacher, noise, teacher.grid(1, "ddim"))
    pipe = deployed(teacher, "ddim")
    call = {**teacher.call(1.0), "num_inference_steps": 1, "latents": teacher.family.pack(noise)}
    drawn = pipe(prompt=list(WORDS), **call, output_type="pt")
    torch.testing.assert_close(teacher.decode(latents[-1]), drawn[0], rtol=1e-4, atol=1e-5)
    images = teacher.to_images(latents[-1])
    theirs = drawn[0] if drawn[0].ndim == 4 else drawn[0][:, drawn[0].shape[1] // 2]
    assert images.dtype == np.uint8 and images.shape == (2, *teacher.resolution, 3)
    np.testing.assert_allclose(images.astype(int), (theirs * 255).round().permute(0, 2, 3, 1).numpy(), atol=1)


@pytest.mark.parametrize("vae", [{}, {"shift_factor": 0.25, "scaling_factor": 0.5}])
def test_latents_are_the_scaled_and_shifted_posterior_mean(teachers, vae):
    parts = {**teachers["sd"].pipe.components, "vae": tiny_vae(**vae).eval(), "requires_safety_checker": False}
    teacher = replace(teachers["sd"], pipe=diffusers.StableDiffusionPipeline(**parts))
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    latents = teacher.to_latents(images, batch=2)
    x = teacher.pipe.image_processor.preprocess([Image.fromarray(i) for i in images])
    with torch.no_grad():
        mean = teacher.pipe.vae.encode(x).latent_dist.mode()
    assert latents.shape == (3, *teacher.latent_shape)
    scale, shift = vae.get("scaling_factor", 0.18215), vae.get("shift_factor", 0)
    torch.testing.assert_close(latents, (mean - shift) * scale, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        there = teacher.pipe.image_processor.postprocess(teacher.pipe.vae.decode(mean).sample, output_type="pil")
    theirs = np.stack([np.asarray(p) for p in there])
    np.testing.assert_allclose(teacher.to_images(latents).astype(int), theirs.astype(int), atol=1)  # ties round either way


def test_pixels_survive_the_round_trip(teachers):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    teacher = teachers["ddpm"]
    latents = teacher.to_latents(images)
    assert float(latents.min()) >= -1 and float(latents.max()) <= 1
    np.testing.assert_array_equal(teacher.to_images(latents, batch=2), images)
    assert teacher.resolution == (8, 8)
