"""A mixture of experts along the time axis: a student's shape, which any objective can train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.denoiser import Bound, Cond, Denoiser


@final
class PhasedExperts(nn.Module):
    """Networks of one family of which each answers for a stretch of times (Phased DMD, arXiv 2510.27684).

    To the trainer it is a role: it has the union of its experts' weights, named "NUMBER.their name"; expert 0 is that of the
    noisiest times. Which one answers is said by the Denoiser around it, whose `call` is `hand_over` and which has `switches`.
    Experts that do not answer take no part in the graph: a turn that asks one alone leaves the others, and what their optimizer
    remembers, as they are.
    call: the family's, (expert, x, time, cond) -> raw output.
    """

    def __init__(
        self, name: str, experts: Sequence[nn.Module], call: Callable[[Callable[..., object], Tensor, Tensor, Cond], Tensor]
    ) -> None:
        super().__init__()
        self.name, self.call = name, call
        self.experts = nn.ModuleList(experts)

    @property
    def net(self) -> Any:
        """The Diffusers networks; experts that are adapters share theirs."""
        members: list[Any] = list(self.experts)
        return nn.ModuleList([expert.net for expert in members])

    def weights(self) -> dict[str, nn.Parameter]:
        """All experts' own parameters."""
        members: list[Any] = list(self.experts)
        return {f"{k}.{name}": p for k, expert in enumerate(members) for name, p in expert.weights().items()}

    def forward(self, x: Tensor, time: Tensor, cond: Cond, *, experts: Sequence[int], **inputs: Tensor) -> Tensor:
        """The raw output (B, C, *S), row i by expert experts[i]; inputs (B,): what the networks take besides."""
        asked = sorted(set(experts))
        if len(asked) == 1:
            return self._ask(asked[0], x, time, cond, inputs)
        parts: list[Tensor] = []
        order: list[Tensor] = []
        for k in asked:
            rows = torch.tensor([i for i, expert in enumerate(experts) if expert == k])
            here = rows.to(x.device)
            own = {name: value[here] for name, value in inputs.items()}
            parts.append(self._ask(k, x[here], time[here], Cond({n: v[rows.to(v.device)] for n, v in cond.tensors.items()}), own))
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort().to(x.device)]

    def _ask(self, k: int, x: Tensor, time: Tensor, cond: Cond, inputs: dict[str, Tensor]) -> Tensor:
        net: Callable[..., object] = self.experts[k]
        return self.call(Bound(net, inputs) if inputs else net, x, time, cond)


def hand_over(net: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """The `call` of a Denoiser around experts (possibly wrapped): they are one module with one forward, and call the family's."""
    return net(x, time, cond)


def along(one: Denoiser, experts: nn.Module, grid: Sequence[float], phases: int) -> Denoiser:
    """The Denoiser around experts (possibly wrapped) that share a trained grid; one: that around an expert alone."""
    return replace(one, net=experts, call=hand_over, switches=switches(grid, phases))


def apart(weights: Mapping[str, Tensor], phases: int) -> list[dict[str, Tensor]]:
    """The weights of each expert, named as its own, from those of a student of `phases` experts, of one as well."""
    if phases == 1:
        return [dict(weights)]
    return [{k.partition(".")[2]: v for k, v in weights.items() if k.startswith(f"{i}.")} for i in range(phases)]


def switches(grid: Sequence[float], phases: int) -> tuple[float, ...]:
    """The times of a deployed grid at which its phases 1, 2, ... begin, equally many steps each.

    Raises ValueError where the steps cannot be shared out."""
    if len(grid) % phases:
        raise ValueError(f"{len(grid)} steps cannot be shared out over {phases} phases; choose a multiple of {phases}")
    each = len(grid) // phases
    return tuple(grid[k * each] for k in range(1, phases))
