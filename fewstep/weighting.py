"""A trained role that is no network of the teacher's kind: how much losses at each time weigh."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn

from fewstep.embedders import WIDTH, waves
from fewstep.networks import Role


@final
class Weighting(nn.Module):
    """The log-weight w (B,), float32, of a loss L at times t (B,): least in e^w L - w where e^w = 1 / E[L | t], so that losses at
    all times come to have one size (Kendall et al., arXiv 1705.07115; sCM, arXiv 2410.11081, equation 8).

    One linear layer on the waves that networks are told their time by. It starts at zero: as if there were no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear(waves(t).to(self.linear.weight, non_blocking=True)).squeeze(1)


def weighting_role(wanted: Iterable[str]) -> dict[str, Role]:
    """Where it is among the wanted roles, fresh log-weights as a role."""
    return {"weighting": Role("weighting", Weighting(), owns=True, dtype=torch.float32)} if "weighting" in wanted else {}
