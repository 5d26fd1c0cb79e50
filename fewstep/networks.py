"""Roles: teacher, student, critic as full copies of a network, or as LoRA adapters on one shared frozen base."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fewstep import embedders
from fewstep.experts import PhasedExperts, Relay
from fewstep.heads import Heads
from fewstep.slim import body
from fewstep.storage import Keeping, keep_small, noting
from fewstep.taps import Enough


@dataclass(frozen=True)
class Full:
    """A role with weights of its own, all trained. inputs: what its network takes besides, see `embedders`. network: settings of
    its config that are not the base's, see `slim`."""

    inputs: tuple[str, ...] = ()
    network: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lora:
    """A role that is an adapter on the frozen base. alpha / rank is the adapter's scale; alpha None means rank, scale 1."""

    rank: int
    alpha: float | None = None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


# Where the adapter of a running forward is recorded, so that a checkpointed block is recomputed under the same one.
_ACTIVE = "_fewstep_adapter"


def _activate(base: nn.Module, adapter: str | None) -> None:
    """Makes `adapter` (None: the bare base) the one that `base` computes with; costs nothing when it already is.

    PEFT's own `set_adapter` also flips requires_grad, which belongs to the trainer, so its two switches are set directly."""
    if getattr(base, _ACTIVE, "") == adapter:
        return
    for layer in base.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._disable_adapters = adapter is None
            layer._active_adapter = [] if adapter is None else [adapter]
    setattr(base, _ACTIVE, adapter)


class Role(nn.Module):
    """One player's view of a network: its `parameters()` are what it trains, its `forward` computes with its own weights.

    A full role owns its network. An adapter role owns only its adapter's matrices and borrows the base; it can therefore be
    handed to DistributedDataParallel on its own. dtype below float32 runs the forward under autocast.
    """

    def __init__(self, name: str, net: nn.Module, *, adapter: str | None = None, owns: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.adapter, self.owns, self.dtype = name, adapter, owns, dtype
        object.__setattr__(self, "_net", net)  # hidden from nn.Module: borrowed weights are not this role's parameters
        self.adopt()

    def adopt(self) -> None:
        """Takes the network's tensors, as they are now, for its own where they are."""
        for key, value in self.weights().items():
            self.register_parameter(key.replace(".", "/"), value)

    @property
    def net(self) -> Any:
        """The Diffusers network itself."""
        return self.__dict__["_net"]

    def weights(self) -> dict[str, nn.Parameter]:
        """The role's own parameters by their name in the network; an adapter's keys carry no adapter name."""
        named = dict(self.net.named_parameters()) if self.adapter or self.owns else {}
        if self.adapter is None:
            return named
        mark = f".{self.adapter}."
        return {k.replace(mark, "."): p for k, p in named.items() if mark in k and ".lora_" in k}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        _activate(self.net, self.adapter)
        device = next(self.net.parameters()).device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32), noting(self.net):
            try:
                return self.net(*args, **kwargs)
            except Enough as enough:  # a return value, so that DistributedDataParallel ends its forward in order
                return enough.features


def _remembering_checkpoint(base: nn.Module):
    """A gradient-checkpointing function that recomputes a block under the adapter its forward ran with.

    Without it a role switch between forward and backward gives silently wrong gradients."""

    def run(block: nn.Module, *args: Any) -> Any:
        adapter, ended = getattr(base, _ACTIVE, None), []

        def again(*inputs: Any) -> Any:
            _activate(base, adapter)
            try:
                return block(*inputs)
            except Enough as enough:  # passed on below: an exception through `checkpoint` leaves its hooks in place
                ended.append(enough)

        out = torch.utils.checkpoint.checkpoint(again, *args, use_reentrant=False)
        if ended:
            raise ended[0]
        return out

    return run


def build(
    base: Any,
    wanted: Mapping[str, Full | Lora],
    *,
    lora_targets: Iterable[str],
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    storage: Keeping | None = None,
    seed: int = 0,
) -> dict[str, Role]:
    """The teacher and the wanted roles on one frozen base, which is changed in place (frozen, cast to dtype, adapters injected).

    Full roles are float32 copies, or networks of another shape. storage: how the base's matrices are kept, whole by default.
    Raises ValueError if no layer of the network matches `lora_targets`, or a shape is none."""
    base.requires_grad_(False).eval()
    copies = {name: body(base, kind.network, seed) for name, kind in wanted.items() if isinstance(kind, Full)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, net in copies.items():
            embedders.gain(net, wanted[name].inputs)  # type: ignore[union-attr]
            net.requires_grad_(True)
    if any(p.dtype != dtype for p in base.parameters()):
        base.to(dtype)
    if storage is not None:
        one = base.first if isinstance(base, Relay) else base
        own = (*(one._skip_layerwise_casting_patterns or ()), *(one._keep_in_fp32_modules or ()))
        keep_small(base, storage, dtype, {*DEFAULT_SKIP_MODULES_PATTERN, *own})
    targets = list(lora_targets)
    for name, kind in wanted.items():
        if isinstance(kind, Lora):
            _inject(base, name, kind, targets, seed)
    if checkpointing:
        for net in (base, *copies.values()):
            net.enable_gradient_checkpointing(_remembering_checkpoint(net))
    roles = {"teacher": Role("teacher", base, owns=False, dtype=dtype)}
    for name in wanted:
        if name in copies:
            roles[name] = Role(name, copies[name], owns=True, dtype=dtype)
        else:
            roles[name] = Role(name, base, adapter=name, owns=False, dtype=dtype)
    return roles


def _inject(base: nn.Module, name: str, kind: Lora, targets: list[str], seed: int) -> None:
    config = LoraConfig(r=kind.rank, lora_alpha=kind.alpha or kind.rank, target_modules=targets, init_lora_weights=True)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what we are about
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, base, adapter_name=name)
        except ValueError as error:
            raise ValueError(f"no layer of {type(base).__name__} matches the LoRA targets {targets}: {error}") from error
    setattr(base, _ACTIVE, "")
    for key, p in base.named_parameters():
        if f".{name}." in key and ".lora_" in key:
            p.data = p.data.float()
            p.requires_grad_(True)
        elif ".lora_" not in key:
            p.requires_grad_(False)


def heads_role(roles: Mapping[str, Role | PhasedExperts], heads: Heads, seed: int) -> Role:
    """Discriminator heads as a role, float32, on the network whose features they judge."""
    return Role("heads", heads.build(roles[heads.backbone].net, seed), owns=True, dtype=torch.float32)


def expert_names(phases: int) -> tuple[str, ...]:
    """The roles that the student's experts are built as; the student itself where it is one network."""
    return ("student",) if phases == 1 else tuple(f"student_{k}" for k in range(phases))


def gather(roles: Mapping[str, Role], phases: int, call: Callable[..., Tensor]) -> dict[str, Role | PhasedExperts]:
    """The roles with the student's experts, if it has some, as one role. call: the family's."""
    names = expert_names(phases)
    if phases == 1:
        return dict(roles)
    if isinstance(roles["teacher"].net, Relay):
        raise ValueError("this teacher is two networks along time, and so is its student as it is; leave student.phases away")
    others: dict[str, Role | PhasedExperts] = {name: role for name, role in roles.items() if name not in names}
    return {**others, "student": PhasedExperts("student", [roles[name] for name in names], call)}


def parameter_bytes(roles: Iterable[Role]) -> int:
    """Bytes of all distinct parameters that the roles compute with: a shared base counts once."""
    seen = {p.data_ptr(): p.numel() * p.element_size() for role in roles for p in role.net.parameters()}
    return sum(seen.values())


UNHEARING = AttnProcessor2_0, JointAttnProcessor2_0


def attend(roles: Iterable[Role], backend: str) -> None:
    """Has their networks attend by a backend of Diffusers. Raises ValueError where it does not work here.

    Layers of UNets, DiT and SD3 do not hear of backends, and would stay with sdpa; they know xformers in a way of their own."""
    try:
        for role in roles:
            role.net.set_attention_backend(backend)
            layers = [layer for layer in role.net.modules() if hasattr(layer, "processor")]
            plain = [layer for layer in layers if backend == "xformers" and isinstance(layer.processor, UNHEARING)]
            for layer in plain:
                layer.set_use_memory_efficient_attention_xformers(True)
            if not plain and not any(hasattr(layer.processor, "_attention_backend") for layer in layers):
                raise ValueError(f"{type(role.net).__name__} cannot be told to")
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"train.attention: {backend} does not work here ({error}); sdpa always does") from error


def set_weights(role: Role | PhasedExperts, tensors: Mapping[str, Tensor]) -> None:
    """Copies named tensors into a role's own parameters. Raises ValueError if the names differ."""
    own = role.weights()
    if missing := sorted(set(own) ^ set(tensors)):
        raise ValueError(
            f"the stored {role.name} has other weights than this config makes ({missing[0]}); use the config it was made with"
        )
    with torch.no_grad():
        for key, p in own.items():
            p.copy_(tensors[key])


class swapped:
    """Runs a block with other weights in a role, and puts its own back."""

    def __init__(self, role: Role | PhasedExperts, weights: Mapping[str, Tensor]) -> None:
        self.role, self.weights = role, weights

    def __enter__(self) -> None:
        self.own = {k: p.detach().clone() for k, p in self.role.weights().items()}
        set_weights(self.role, self.weights)

    def __exit__(self, *error: object) -> None:
        set_weights(self.role, self.own)


@torch.no_grad()
def follow(role: Role | PhasedExperts, leader: Role | PhasedExperts, share: float) -> None:
    """Moves a role's weights a share of the way towards a leader's of the same kind: w + share (leader's - w).

    Adapters move matrix by matrix. That mixes their products only to first order, and wants the same start, which adapters of
    one rank and seed have."""
    own, other = role.weights(), leader.weights()
    assert own.keys() == other.keys(), "the config refuses followers of another kind"
    for key, p in own.items():
        p.lerp_(other[key], share)
