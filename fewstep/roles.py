"""The roles of a config: networks on its teacher's, and what is trained beside them."""

from __future__ import annotations

from functools import partial

import torch

from fewstep.adapters import Teacher
from fewstep.config import ATTENTION, Config
from fewstep.experts import PhasedExperts
from fewstep.networks import Role, attend, build, gather, heads_role
from fewstep.pixels import pixels_role
from fewstep.storage import KEEPINGS
from fewstep.weighting import weighting_role


def roles_of(config: Config, teacher: Teacher) -> dict[str, Role | PhasedExperts]:
    """Every role by its name, fresh. Raises ValueError for what cannot be made of this teacher, or does not work here."""
    objective, family = config.objective, teacher.family
    built = build(
        teacher.net,
        config.kinds(),
        lora_targets=family.lora_targets,
        dtype=getattr(torch, config.train.dtype),
        checkpointing=config.train.checkpointing,
        storage=KEEPINGS.get(config.teacher.storage),
        seed=config.train.seed,
    )
    if (backend := ATTENTION[config.train.attention]) != "native":
        attend(built.values(), backend)
    if objective.needs.heads.backbone == "pixels" and len(teacher.latent_shape) > 3:
        raise ValueError("objective: pixel heads look at pictures, and this teacher draws videos; use dmd2, ladd or projected")
    roles = gather(built, config.phases, family.call) | weighting_role(objective.needs.roles)
    if "heads" in objective.needs.roles:
        roles |= pixels_role(objective.needs.heads, partial(family.decode, teacher.pipe), getattr(teacher.pipe, "vae", None))
        roles["heads"] = heads_role(roles, objective.needs.heads, config.train.seed)
    return roles
