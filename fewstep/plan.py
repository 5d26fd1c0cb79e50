"""`fewstep plan`: what a config will do, from the teacher's configs alone; no weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from fewstep.config import Config
from fewstep.deploy import falling, seen_times
from fewstep.experts import Relay
from fewstep.families import Family, family_of, make_scheduler, setting_of
from fewstep.folders import pipeline_name, teacher_folder
from fewstep.networks import build, gather, heads_role
from fewstep.pixels import pixels_role
from fewstep.shapes import sizes_of


def plan(config: Config) -> dict[str, Any]:
    """Deploy grid, roles, parameters and disk of a run. Raises ValueError for what could not work.

    Of a run of stages: what its last one is, the disk of all, and each of them under `stages`."""
    if config.stages:
        return _of_stages(config)
    folder = teacher_folder(config.teacher.path)
    if folder is None:
        raise ValueError(
            f"{config.teacher.path} is a hub id; plan reads folders only, so that it needs no network: save the pipeline first"
        )
    name = pipeline_name(folder)
    family = family_of(name)
    net, scheduler, vae = _skeleton(folder, family)
    wish = config.teacher
    setting = setting_of(family, dict(net.config), dict(vae.config) if vae else {}, wish.size, wish.guidance)
    schedule = family.schedule(scheduler)
    sampler = config.objective.sampler or next(iter(family.samplers))
    kind = getattr(diffusers, family.deployed or name)
    grids = {}
    for n in sorted({1, 2, 4, config.objective.steps}):
        seen = seen_times(kind, family, net, vae, make_scheduler(family, scheduler.config, sampler), n, setting)
        falling(schedule, seen, n)
        grids[str(n)] = [round(x, 3) for x in seen]
    sizes = sizes_of(family, dict(net.config), dict(vae.config) if vae else {}, setting.size, config.data.aspect)
    base = sum(p.numel() for p in net.parameters())
    roles = gather(build(net, config.kinds(), lora_targets=family.lora_targets), config.phases, family.call)
    if "heads" in config.objective.needs.roles:
        roles |= pixels_role(config.objective.needs.heads, lambda x: x, None)  # the one network that is loaded, as small as it is
        with torch.device("meta"):
            roles["heads"] = heads_role(roles, config.objective.needs.heads, config.train.seed)
    frozen = ("teacher", "average", "tutor", "pixels")
    trained = {k: sum(p.numel() for p in role.parameters()) for k, role in roles.items() if k not in frozen}
    averages = 4 * trained["student"] * (1 + ("average" in roles))
    disk = sum(12 * n for n in trained.values()) + averages
    return {
        "teacher": f"{config.teacher.path} ({name}, {base / 1e6:.2f} M parameters)",
        "sampler": f"{sampler} ({family.samplers[sampler][0]})",
        "grid (network times)": grids,
        "sizes": [list(size) for size in sizes],
        "trained parameters": trained,
        "disk, a checkpoint (MiB)": round(disk / 2**20, 1),
        "settings": config.model_dump(mode="json"),
    }


def _of_stages(config: Config) -> dict[str, Any]:
    each = [plan(stage) for stage in config.stages]
    disk = "disk, a checkpoint (MiB)"
    own = ("sampler", "grid (network times)", "trained parameters", disk)
    return each[-1] | {
        disk: round(sum(found[disk] for found in each), 1),
        "stages": {f"stage-{i}": {key: found[key] for key in own} for i, found in enumerate(each, 1)},
        "settings": config.model_dump(mode="json"),
    }


def _skeleton(folder: Path, family: Family) -> tuple[Any, Any, Any]:
    """The network without memory for its weights, the scheduler, and the autoencoder (None without one)."""
    kind, rules = _config_of(folder, family.component), _config_of(folder, "scheduler")
    for part, found in ((family.component, kind), ("scheduler", rules)):
        if "_class_name" not in found:
            raise ValueError(f"{_file_of(folder, part)} is missing or damaged; save the pipeline again with pipe.save_pretrained")
    with torch.device("meta"):
        net = getattr(diffusers, kind["_class_name"]).from_config(kind)
        second = _config_of(folder, family.second or "")
        if family.second and "_class_name" in second:
            other = getattr(diffusers, second["_class_name"]).from_config(second)
            boundary = json.loads((folder / "model_index.json").read_text())["boundary_ratio"]
            net = Relay({family.component: net, family.second: other}, boundary)
        coder = _config_of(folder, "vae")
        vae = getattr(diffusers, coder["_class_name"]).from_config(coder) if "_class_name" in coder else None
    return net, getattr(diffusers, rules["_class_name"]).from_config(rules), vae


def _file_of(folder: Path, part: str) -> Path:
    return folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")


def _config_of(folder: Path, part: str) -> dict[str, Any]:
    try:
        return json.loads(_file_of(folder, part).read_text())
    except (OSError, ValueError):
        return {}
