"""What a run will hold in memory: its very turns, on networks without weights, under an instrument that counts tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from fewstep.config import Config
from fewstep.costs import Ledger
from fewstep.data import CHUNK, ENCODED_AT_ONCE, read_prompts
from fewstep.denoiser import Cond
from fewstep.ema import Ema
from fewstep.networks import Role
from fewstep.objectives import Batch, Turn
from fewstep.optimizers import KINDS
from fewstep.sampling import STEPS, sample
from fewstep.slim import try_out
from fewstep.stream import stream
from fewstep.study import Study, study_of
from fewstep.weightless import TrueMasks, bare, pretend, quiet, weightless, weightless_teacher
from fewstep.zoo import SOURCES

A_PROMPT = "an old stone bridge over a quiet river in the light of a late summer afternoon, two boats below it, oil on canvas"
PICTURES = 8  # of a preview
UNKNOWABLE = (DataDependentOutputException, DynamicOutputShapeException)  # networks that read what the device has computed


def told(config: Config) -> dict[str, float | str]:
    """A forecast in MiB, of the stage that takes most if there are some: its peak, its phases, the parts of its highest turn."""
    try:
        with quiet():
            found = max((forecast(stage) for stage in config.stages or (config,)), key=lambda x: max(x["phases"].values()))
    except UNKNOWABLE as error:
        return {"peak": f"not predicted: something reads what the device has computed ({error})"}
    parts = {f"training, {name}": size for name, size in found["parts"].items() if size}
    return {k: round(v / 2**20, 1) for k, v in {"peak": max(found["phases"].values()), **found["phases"], **parts}.items()}


def forecast(config: Config) -> dict[str, Any]:
    """Most bytes that a run's tensors take at once: `phases`, by phase; `parts`, what they are at the highest point of training.

    Tensors alone are counted: an allocator's gaps, a CUDA context and kernels' workspaces come on top, and so do the encoded
    prompts and images, which stay in host memory. Raises ValueError for a student that does not fit its teacher."""
    mode, data, needs = weightless(), config.data, config.objective.needs
    prompts = sorted(read_prompts(data.prompts), key=len) if data.prompts is not None else [A_PROMPT] * ENCODED_AT_ONCE
    if data.images is not None and data.images not in SOURCES:
        place = Path(data.images).expanduser()
        if not place.exists() and not glob(str(place), recursive=True):
            raise ValueError(f"there are no images at {data.images}; give a folder, .tar or .parquet files, or zoo:sprites")
    study = _study(config, mode)
    teacher, ledger = study.teacher, Ledger()
    with ledger, TrueMasks():
        parts = {name: ledger.hold(tensors) for name, tensors in _resident(study)}
        phases = {"encoding": ledger.highest(lambda: (teacher.encode(prompts[-ENCODED_AT_ONCE:]), study.null))}
        if needs.images and not data.pairs:
            pictures = torch.zeros(teacher.at_once, 3, *teacher.resolution)
            phases["encoding images"] = ledger.highest(lambda: teacher.family.encode_pixels(teacher.pipe, pictures))
        cond = teacher.encode(prompts[-1:]).to("cpu")
        if study.pairs():
            phases["teacher pairs"] = ledger.highest(lambda: _drawn(study, cond.expand(min(CHUNK, data.pairs)), "teacher"))
        study.encoded(painting=True)
        del parts["text encoders"]
        standing = _standing(study, mode)
        parts |= {name: sum(x.numel() * x.element_size() for x in tensors) for name, tensors in standing.items()}
        parts |= _train(study, cond, ledger, phases)
        phases["pictures"] = ledger.highest(lambda: _previewed(study, cond.expand(min(PICTURES, data.pairs or len(prompts)))))
        del standing
    return {"phases": phases, "parts": parts}


def _study(config: Config, mode: FakeTensorMode) -> Study:
    """The study of a config, its networks without weights."""
    teacher = weightless_teacher(config.teacher.path, mode, size=config.teacher.size, guidance=config.teacher.guidance)
    bare(teacher.net)
    study = study_of(config, teacher)
    for role in study.roles.values():
        if role.name != "pixels":  # the one network that is loaded, as small as it is
            pretend(role.net, mode)
    for module in nn.ModuleList(study.roles.values()).modules():
        if isinstance(module, Role):
            module.adopt()
    if config.student.network:
        _try_out(study)
    return study


def _try_out(study: Study) -> None:
    """Refuses a student that training would refuse, in its words; one that only true tensors could tell of passes."""
    try:
        with TrueMasks():
            null = study.teacher.null()  # the study's own is to be counted later, where it is made
            try_out(study.student(study.roles["student"]), study.teacher.latent_shape, null)
    except ValueError as error:
        if not isinstance(error.__cause__, UNKNOWABLE):
            raise


def _resident(study: Study) -> Iterator[tuple[str, list[Tensor]]]:
    """What is there all the time, by name; what belongs to several counts as the first's."""
    for name, role in study.roles.items():
        if name not in ("teacher", "pixels"):
            yield _titled(name, list(role.weights().values()))
    yield _titled("teacher", _tensors(*(role.net for name, role in study.roles.items() if name != "pixels")))
    networks = {k: v for k, v in study.teacher.pipe.components.items() if isinstance(v, nn.Module)}
    yield "autoencoder", _tensors(*(v for k, v in networks.items() if k == "vae"))
    yield "text encoders", _tensors(*networks.values())
    if "pixels" in study.roles:
        yield "pixels", _tensors(study.roles["pixels"].net)


def _titled(name: str, tensors: list[Tensor]) -> tuple[str, list[Tensor]]:
    kinds = sorted({str(x.dtype).removeprefix("torch.") for x in tensors if x.numel() > 1})
    return f"{name} ({', '.join(kinds)})", tensors


def _tensors(*networks: nn.Module) -> list[Tensor]:
    return [x for net in networks for x in (*net.parameters(), *net.buffers())]


def _standing(study: Study, mode: FakeTensorMode) -> dict[str, list[Tensor]]:
    """What the loop keeps besides the networks."""
    needs, settings, student = study.config.objective.needs, study.config.train, study.roles["student"]
    averages = [Ema(student.weights(), settings.ema).shadow for _ in range(1 + (needs.average is not None))]
    first = [p.detach().clone() for name in needs.restarts for p in study.roles[name].weights().values()]
    trained = [p for name in ("student", *needs.roles) for p in study.roles[name].weights().values()]
    with mode:
        moments = [torch.empty(KINDS[settings.optimizer].remembers(p.shape), dtype=torch.uint8) for p in trained]
    return {"moving averages": [x for shadow in averages for x in shadow.values()] + first, "optimizers": moments}


def _train(study: Study, cond: Cond, ledger: Ledger, phases: dict[str, int]) -> dict[str, int]:
    """Plays each kind of turn once, notes how high it goes, and returns what makes the highest."""
    settings, objective = study.config.train, study.config.objective
    players = {name: study.roles[name] for name in ("student", *objective.needs.roles)}
    ledger.mark(p for role in players.values() for p in role.weights().values())
    nets, n = study.nets(study.roles), settings.batch
    shape = (n, *study.teacher.latent_shape)
    latents = torch.zeros(shape) if objective.needs.images or objective.needs.pairs else None
    batch = Batch(cond.expand(n), shape, latents, latents if objective.needs.pairs else None)
    top, shares = 0, (0, 0)
    for turn in _turns(study):
        for name, role in players.items():
            role.requires_grad_(name in turn.movers)

        def play(turn: Turn = turn) -> None:
            turn.loss(nets, batch, stream(0, 0, 0, turn.player)).total.backward()

        resident, key = ledger.held, f"the {turn.player}'s turn"
        peak = ledger.highest(play)
        if peak > top:
            top, shares = peak, (ledger.gradients, peak - resident - ledger.gradients)
        phases[key] = max(peak, phases.get(key, 0))
        for name in turn.movers:
            players[name].zero_grad(set_to_none=True)
    return {"gradients": shares[0], "activations": shares[1]}


def _turns(study: Study) -> list[Turn]:
    """One turn of each kind that the objective plays in its first, its middle and its last round."""
    rounds, found = study.config.train.rounds, dict[Any, Turn]()
    for k in sorted({0, rounds // 2, rounds - 1}):
        for turn in study.config.objective.round(k):
            loss = turn.loss.func if isinstance(turn.loss, partial) else turn.loss
            found.setdefault((turn.player, turn.movers, getattr(loss, "__qualname__", "")), turn)
    return list(found.values())


@torch.no_grad()
def _drawn(study: Study, cond: Cond, who: str) -> Tensor:
    """Samples of the teacher or the student, in one step: further ones hold no more."""
    teacher, sampler = study.teacher, study.sampler if who == "student" else "ddim"
    times = teacher.grid(1, sampler)
    denoiser = study.student(study.roles["student"], times) if who == "student" else study.guided(study.roles["teacher"])
    x = torch.zeros(len(cond), *teacher.latent_shape)
    return sample(denoiser, x, times, cond, step=STEPS[sampler], rng=stream(0, 0, 0, who))


@torch.no_grad()
def _previewed(study: Study, cond: Cond) -> None:
    study.teacher.decode(_drawn(study, cond, "teacher")[: study.teacher.at_once])
    swapped = [p.detach().clone() for p in study.roles["student"].weights().values()]
    study.teacher.decode(_drawn(study, cond, "student")[: study.teacher.at_once])
    del swapped
