"""Export: a finished student as files that stock Diffusers (and ComfyUI) load, with what `verify` needs to prove it."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep import __version__, card, embedders, lorafiles, loraformat, mixture, origin, proof, swap
from fewstep.adapters import Teacher, load_teacher, teacher_folder
from fewstep.denoiser import Denoiser
from fewstep.experts import PhasedExperts, along, apart, by_component
from fewstep.networks import Full, Lora, Role, build, set_weights
from fewstep.sampling import STEPS, sample
from fewstep.slim import body

FACTS, REFERENCE = "fewstep.json", "reference.safetensors"
RESULTS = "results*.json"  # what `fewstep eval` measured of an export, written into it
LORA_FILE = mixture.LORA_FILE
ENDS_FILE, TOLD = "end_embedder.safetensors", "told.py"  # of a student that is told the end of its jump, and what tells it
COUNTS = (1, 2, 4)  # what an export documents and proves, besides the count it was trained for
SEED = 0


def export(
    teacher: Teacher,
    kind: Full | Lora,
    weights: Mapping[str, Tensor],
    *,
    sampler: str,
    steps: int,
    to: Path,
    form: str | None = None,
    layout: str | None = None,
    record: dict[str, Any],
    guidance: float = 1.0,
    phases: int = 1,
    counts: Sequence[int] = COUNTS,
    scales: tuple[float, float] | None = None,
) -> Path:
    """Writes the student `weights` (named as Role.weights() does) to the folder `to`, whole or not at all, and returns it.

    form: "lora", "full" (a LoRA is merged), or None for the student's own. layout: a LoRA's key names, "diffusers", "peft" (a
    PEFT folder), "comfyui" or "kohya"; None for Diffusers', or PEFT's where the class has no LoRA loader. record: how it was
    made, JSON-able; the card names the objective of record["config"] and shows record["results"], rows and protocol, where they
    are there. guidance: the scale that a student which takes one draws at: stock code feeds it where the network's class can take
    it, else it is folded into the weights. scales: the range that it was trained at. counts: step counts to document and prove
    besides `steps`. A student that is told the end of its jump is exported with the pipeline that tells it; one of a single step
    without, for that step alone.
    Raises ValueError if `to` holds something else, the family, form, layout and sampler do not go together, or the network's
    time embedding cannot hold what it was told."""
    to = Path(to).absolute()
    form, names = lorafiles.choose(teacher, kind, form, layout, phases)
    told = isinstance(kind, Full) and embedders.END in kind.inputs
    if told and phases > 1:
        raise ValueError("no pipeline tells several experts the end of their jump; export a student of one network")
    swap.restore(to)
    refuse_foreign(to)
    teacher = _pristine(teacher)
    times = {n: teacher.grid(n, sampler) for n in sorted({steps} if told and steps == 1 else {*counts, steps})}
    students, scheduler = [_student(teacher, kind, own) for own in apart(weights, phases)], teacher.scheduler(sampler)
    takes = embedders.inputs(students[0].net)
    scale = guidance if embedders.GUIDANCE in takes and embedders.stock_guidance(students[0].net) else None
    with swap.written(to) as part:
        folded = [loraformat.fold(own, kind.scale) for own in apart(weights, phases)] if isinstance(kind, Lora) else []
        if names is not None:
            files = lorafiles.files(names, phases, teacher.components)
            adapters = [own for whole in folded for own in loraformat.apart(whole, teacher.components)]
            for own, file in zip(adapters, files.values(), strict=True):
                lorafiles.write(teacher, own, names, part, file)
            scheduler.save_pretrained(part / "scheduler")
        else:
            files = mixture.folders(phases)
            nets = [_network(teacher, role, folded[k] if folded else {}, guidance) for k, role in enumerate(students)]
            _deployed(teacher, nets[0], scheduler).save_pretrained(part, safe_serialization=True)
            for net, folder in zip(nets[1:], list(files.values())[1:], strict=True):
                net.save_pretrained(part / folder, safe_serialization=True)
        facts = _facts(teacher, scheduler, scale, form=form, sampler=sampler, steps=steps, times=times, record=record)
        if embedders.GUIDANCE in takes:
            facts["scales"] = {"at": guidance, "range": scales, "folded": scale is None}
        if names is not None:
            facts["lora"] = lorafiles.facts(adapters, names, list(files.values()), teacher.components)
        if phases > 1:
            facts |= {"runs_by": mixture.PIPELINE, "experts": mixture.facts(facts["times"][str(steps)], files)}
        if told and steps > 1:
            facts |= {"runs_by": TOLD, "ends": _write_ends(teacher, students[0].net, part / ENDS_FILE)}
        if facts["runs_by"]:
            shutil.copyfile(Path(__file__).with_name(facts["runs_by"]), part / facts["runs_by"])

        def deployed(grid: tuple[float, ...]) -> Denoiser:
            one = teacher.denoiser(students[0], guidance, grid)
            if phases == 1:
                return one
            return along(one, PhasedExperts("student", students, teacher.family.call), times[steps], phases)

        _write_reference(teacher, deployed, sampler, times, part / REFERENCE)
        (part / "README.md").write_text(card.write(teacher, facts, to.name), "utf-8")
        facts["files"] = sorted({FACTS, *swap.files_of(part)})
        (part / FACTS).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
        _keep_results(to, part)
    return to


def refuse_foreign(to: Path) -> None:
    """Raises ValueError if a folder holds anything but an earlier export and what was measured of it."""
    if to.exists() and (not to.is_dir() or (any(to.iterdir()) and not (to / FACTS).exists())):
        raise ValueError(f"{to} holds something that is not a fewstep export; choose another folder, nothing was changed")
    if not (found := swap.files_of(to)):
        return
    try:
        listed = json.loads((to / FACTS).read_text("utf-8"))["files"]
        foreign = sorted(file for file in found.difference(listed) if not fnmatch(file, RESULTS))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the {FACTS} in {to} does not list the export's files, so that others cannot be told from them; "
            "remove that folder, or choose another one, nothing was changed"
        ) from error
    if foreign:
        more = f" and {len(foreign) - 1} more files" if foreign[1:] else ""
        raise ValueError(
            f"{to} holds {foreign[0]}{more} beside the export there; take that out, or choose another folder, nothing was changed"
        )


def _keep_results(old: Path, new: Path) -> None:
    """What was measured of the old export goes along where the new one draws the same: where their reference pictures agree."""
    if not (measured := sorted(old.glob(RESULTS))):
        return
    try:
        before, now = (load_file(folder / REFERENCE) for folder in (old, new))
        same = before.keys() == now.keys() and all(torch.equal(before[k], now[k]) for k in now)
    except (OSError, SafetensorError):
        same = False
    for file in measured:
        if same:
            shutil.copyfile(file, new / file.name)
        else:
            said = f"{file} was measured of what lay there before and is dropped; `fewstep eval {old}` measures it anew"
            warnings.warn(said, stacklevel=3)


def _pristine(teacher: Teacher) -> Teacher:
    """The teacher as its folder has it: float32 on the CPU and without adapters, loaded again if training changed it."""
    parts = [part for part in teacher.pipe.components.values() if isinstance(part, nn.Module)]
    tensors = (p for part in parts for p in part.parameters())
    changed = any(p.dtype != torch.float32 or p.device.type != "cpu" for p in tensors)
    if not changed and not any(isinstance(m, BaseTunerLayer) for m in teacher.net.modules()):
        return teacher
    return replace(load_teacher(teacher.path), setting=teacher.setting, first=teacher.first)


def _student(teacher: Teacher, kind: Full | Lora, weights: Mapping[str, Tensor]) -> Role:
    """The student as training had it, adapter unfolded and unmerged, on a copy of the teacher's network or its own."""
    if isinstance(kind, Full):
        net = body(teacher.net, kind.network, SEED)
        embedders.gain(net, kind.inputs)
        role = Role("student", net, owns=True, dtype=torch.float32)
    else:
        role = build(copy.deepcopy(teacher.net), {"student": kind}, lora_targets=loraformat.modules(weights))["student"]
    set_weights(role, weights)
    return role


def _network(teacher: Teacher, student: Role, folded: dict[str, Tensor], guidance: float) -> Any:
    """The student's network as stock Diffusers loads it: its adapter merged, its guidance folded where it cannot be fed."""
    net = student.net
    if folded:
        net = copy.deepcopy(teacher.net)
        net.load_state_dict(loraformat.merge(net.state_dict(), folded))
    takes = embedders.inputs(net)
    if embedders.END in takes or (embedders.GUIDANCE in takes and not embedders.stock_guidance(net)):
        net = copy.deepcopy(net)
        embedders.fold(net, guidance)
    return net


def _write_ends(teacher: Teacher, net: Any, to: Path) -> dict[str, Any]:
    """Writes the embedder of a network's ends, which `_network` folds for the clean end. Returns what `told.py` reads."""
    save_file(net.gained.embed[embedders.END].state_dict(), to)
    clock = teacher.schedule.model_time(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    return {"file": to.name, "module": embedders.time_module(net), "clock": clock}


def _deployed(teacher: Teacher, net: Any, scheduler: Any) -> Any:
    """The teacher's pipeline around the student's network and the student's scheduler."""
    parts = {**by_component(net, teacher.family.component), "scheduler": scheduler}
    if teacher.family.deployed:
        return getattr(diffusers, teacher.family.deployed)(**parts)
    pipe = copy.copy(teacher.pipe)
    pipe.register_modules(**parts)
    return pipe


def _takes_latents(teacher: Teacher) -> bool:
    return "latents" in inspect.signature(type(teacher.pipe).__call__).parameters


def _facts(
    teacher: Teacher,
    scheduler: Any,
    scale: float | None,
    *,
    form: str,
    sampler: str,
    steps: int,
    times: dict[int, tuple[float, ...]],
    record: dict[str, Any],
) -> dict[str, Any]:
    family = teacher.family
    call = {"num_inference_steps": steps, **teacher.call(1.0 if scale is None else scale), **family.spacing(sampler, steps)}
    folder = teacher_folder(teacher.path)
    index = folder / "model_index.json" if folder else None
    path = teacher.path if folder is None or teacher.path.startswith("zoo:") else str(folder.resolve())
    raw = {str(n): teacher.schedule.model_time(torch.tensor(t, dtype=torch.float64)).tolist() for n, t in times.items()}
    return {
        "format": proof.FORMAT,
        "fewstep": __version__,
        "git": origin.git_hash(),
        "teacher": {"path": path, "model_index_sha256": hashlib.sha256(index.read_bytes()).hexdigest() if index else None},
        "base_pipeline": type(teacher.pipe).__name__,
        "pipeline": family.deployed or type(teacher.pipe).__name__,
        "components": list(teacher.components),
        "scheduler": type(scheduler).__name__,
        "ask": family.ask(teacher.pipe, [family.examples[0]]),
        "video": len(teacher.setting.size) == 3,
        "embedded": family.embedded or scale is not None,  # guidance is an input of the network
        "runs_by": None,  # the custom pipeline that it takes, which lies in it
        "form": form,
        "sampler": sampler,
        "steps": steps,
        "times": raw,
        "call": call,
        "record": card.named(record),
    }


class _Draws:
    """A step's noise as the stock schedulers draw it: one randn of what they step, a step, from the call's generator."""

    def __init__(self, generator: torch.Generator, walked: Callable[[Tensor], Tensor]) -> None:
        self.generator, self.walked = generator, walked

    def normal_like(self, x: Tensor) -> Tensor:
        places = self.walked(torch.arange(x.numel()).reshape(x.shape))
        noise = torch.randn(places.shape, generator=self.generator, dtype=x.dtype)
        return torch.empty_like(x).flatten().scatter(0, places.flatten(), noise.flatten()).reshape(x.shape)


@torch.no_grad()
def _write_reference(
    teacher: Teacher,
    deployed: Callable[[tuple[float, ...]], Denoiser],
    sampler: str,
    times: dict[int, tuple[float, ...]],
    to: Path,
) -> None:
    """fewstep's own pictures, float32: what the stock pipeline must draw from the same latents, prompts and seed. deployed: the
    student on a grid.

    Of large pictures every `stride`-th row and column is kept. Pipelines that take no latents draw them themselves, as here."""
    given, prompts = _takes_latents(teacher), list(teacher.family.examples)
    cond = teacher.encode(prompts)
    shape = (len(prompts), *teacher.latent_shape)
    stride = max(1, min(teacher.resolution) // 128)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED + 1))
    tensors = {}
    for n, grid in times.items():
        generator = torch.Generator().manual_seed(SEED)
        if not given:
            noise = torch.randn(shape, generator=generator)
        rng: Any = _Draws(generator, teacher.family.walked or teacher.family.pack)
        x = sample(deployed(grid), noise, grid, cond, step=STEPS[sampler], rng=rng)
        tensors[f"images_{n}"] = teacher.decode(x)[..., ::stride, ::stride].contiguous()
    tensors["latents"] = teacher.family.pack(noise).contiguous()
    notes = {"ask": json.dumps(teacher.family.ask(teacher.pipe, prompts)), "seed": str(SEED), "stride": str(stride)}
    save_file(tensors, to, metadata=notes)
