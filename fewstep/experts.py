"""Mixtures of experts along the time axis: a student's shape, which any objective can train, or a teacher's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
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
        rows = shares(experts)
        if len(rows) == 1:
            return self._ask(experts[0], x, time, cond, inputs)
        parts: list[Tensor] = []
        for k, own in rows.items():
            here = own.to(x.device)
            given = {name: value[here] for name, value in inputs.items()}
            words = Cond({n: v[own.to(v.device)] for n, v in cond.tensors.items()})
            parts.append(self._ask(k, x[here], time[here], words, given))
        return together(parts, rows)

    def _ask(self, k: int, x: Tensor, time: Tensor, cond: Cond, inputs: dict[str, Tensor]) -> Tensor:
        net: Callable[..., object] = self.experts[k]
        return self.call(Bound(net, inputs) if inputs else net, x, time, cond)


@final
class Relay(nn.Module):
    """Networks of one class of which each answers for a stretch of times, as the one network of a teacher (Wan 2.2).

    All its roles have this shape: its student and its critic are as many networks. nets: by the names of the pipeline's
    components, that of the noisiest times first; boundary: the t below which the second answers. Which one is asked is said by
    the Denoiser around it, which has `switches`; those that are not take no part in the graph."""

    def __init__(self, nets: Mapping[str, nn.Module], boundary: float) -> None:
        super().__init__()
        for name, net in nets.items():
            self.add_module(name, net)
        self.names, self.boundary = tuple(nets), boundary
        self.rows: dict[int, Tensor] = {}  # of the forward that is running

    @property
    def first(self) -> Any:
        """The network of the noisiest times; the others are of its class and config."""
        return getattr(self, self.names[0])

    @property
    def config(self) -> Any:
        return self.first.config

    @property
    def switches(self) -> tuple[float, ...]:
        """As `Denoiser.switches`, at and below which the next one answers; the stock pipeline's boundary is still the first's."""
        return (self.boundary - 1e-8,)

    def forward(self, *, experts: Sequence[int], **inputs: Any) -> tuple[Any, ...]:
        """(raw output,), row i by network experts[i]; of the inputs every tensor has a leading axis of as many rows."""
        self.rows = shares(experts)
        if len(self.rows) == 1:
            return getattr(self, self.names[experts[0]])(**inputs)
        parts = []
        for k, own in self.rows.items():
            given = {n: v[own.to(v.device)] if isinstance(v, Tensor) else v for n, v in inputs.items()}
            parts.append(getattr(self, self.names[k])(**given)[0])
        return (together(parts, self.rows),)

    def junction(self, name: str) -> Junction:
        """The blocks of this name, to be tapped as one."""
        return Junction(self, name)

    def enable_gradient_checkpointing(self, function: Callable[..., Any]) -> None:
        for name in self.names:
            getattr(self, name).enable_gradient_checkpointing(function)

    def set_attention_backend(self, backend: str) -> None:
        for name in self.names:
            getattr(self, name).set_attention_backend(backend)


def by_component(net: Any, component: str) -> dict[str, Any]:
    """The parts of a pipeline that a network is, by their names there; component: its name where it is one network."""
    return {name: getattr(net, name) for name in net.names} if isinstance(net, Relay) else {component: net}


class Junction:
    """A block that every network of a relay has: a hook sees its output of all rows of a pass, when the last ones are there."""

    def __init__(self, relay: Relay, name: str) -> None:
        self.relay, self.blocks = relay, [getattr(relay, net).get_submodule(name) for net in relay.names]

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return self.blocks[0].named_modules()

    def register_forward_hook(self, hook: Callable[[Any, Any, Tensor], None]) -> ExitStack:
        """Something whose `close` takes the hook away."""
        parts: list[Tensor] = []

        def gather(module: nn.Module, args: Any, output: Tensor) -> None:
            parts.append(output)
            if len(parts) == len(self.relay.rows):
                whole = together(parts, self.relay.rows)
                parts.clear()
                hook(module, args, whole)

        hooks = ExitStack()
        for block in self.blocks:
            hooks.callback(block.register_forward_hook(gather).remove)
        return hooks


def shares(experts: Sequence[int]) -> dict[int, Tensor]:
    """The rows of each expert that is asked."""
    return {k: torch.tensor([i for i, expert in enumerate(experts) if expert == k]) for k in sorted(set(experts))}


def together(parts: Sequence[Tensor], rows: Mapping[int, Tensor]) -> Tensor:
    """What the experts gave for their rows, in the order in which they were asked for."""
    return torch.cat(list(parts))[torch.cat(list(rows.values())).argsort().to(parts[0].device)]


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
