"""The deployed grid: a stock pipeline's own loop is run once, and the times its network is fed are noted. Never typed twice."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fewstep.experts import Relay, by_component
from fewstep.families import Family, Setting, net_config
from fewstep.schedules import NoiseSchedule


class _Stand(nn.Module):
    """Stands in for a part of a pipeline on the CPU in float32: what it is not asked to do, the real one (weightless) answers."""

    def __init__(self, real: Any) -> None:
        super().__init__()
        self.__dict__["_real"] = real
        self.config, self.dtype, self.device = FrozenDict(real.config), torch.float32, torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class _Coder(_Stand):
    """The autoencoder: nothing is drawn, whatever the pipeline asks for, and its statistics may be any."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return _filled(value) if isinstance(value, nn.Module) else value

    def decode(self, z: Tensor, **about: Any) -> DecoderOutput:
        return DecoderOutput(sample=z)


def _filled(module: nn.Module) -> nn.Module:
    """A copy on the CPU with ones for weights, which are not looked at: fake ones do not survive being copied."""
    tensors = (*module.parameters(), *module.buffers())
    ones = {id(x): nn.Parameter(torch.ones(x.shape, dtype=x.dtype), requires_grad=False) for x in tensors}
    return copy.deepcopy(module, ones)


class _Recorder(_Stand):
    """The network while the pipeline's loop runs: notes the times it is fed, answers zeros."""

    def __init__(self, real: Any, times: list[float]) -> None:
        super().__init__(real)
        self.times = times
        self.signature = inspect.signature(real.forward)

    def cache_context(self, *names: Any, **about: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def forward(self, *args: Any, **kwargs: Any) -> Transformer2DModelOutput:
        values = self.signature.bind(*args, **kwargs).arguments
        time = values.get("timestep", values.get("t"))
        self.times.append(float(torch.as_tensor(time).flatten()[0]))
        x: Any = values.get("sample", values.get("hidden_states", values.get("x")))
        if isinstance(x, list):
            return Transformer2DModelOutput(sample=[torch.zeros_like(v) for v in x])  # type: ignore[arg-type]
        learned = x.ndim == 4 and self.config.get("out_channels") == 2 * x.shape[1]  # a variance comes behind the mean
        return Transformer2DModelOutput(sample=torch.zeros_like(torch.cat([x, x], 1) if learned else x))


def seen_times(
    pipeline: Any, family: Family, net: Any, vae: Any, scheduler: Any, steps: int, setting: Setting, sampler: str
) -> list[float]:
    """The times the network is fed in `steps` steps of a pipeline class. Of `net` and `vae` no weights are read: both may lie on
    the meta device."""
    takes = inspect.signature(pipeline.__init__).parameters
    parts: dict[str, Any] = {name: None for name, p in takes.items() if name != "self" and p.default is inspect.Parameter.empty}
    parts |= {"requires_safety_checker": False} if "requires_safety_checker" in takes else {}
    times: list[float] = []
    parts |= {k: _Recorder(one, times) for k, one in by_component(net, family.component).items()} | {"scheduler": scheduler}
    parts |= {"boundary_ratio": net.boundary} if isinstance(net, Relay) else {}
    if vae is not None:
        parts["vae"] = _Coder(vae)
    call = {
        "num_inference_steps": steps,
        "output_type": "latent",
        **family.arguments(setting),
        **family.spacing(sampler, steps),
        **family.no_words(net_config(net)),
    }
    with torch.no_grad():
        probe = pipeline(**parts)
        probe.set_progress_bar_config(disable=True)
        try:
            probe(**call)
        except (ValueError, ArithmeticError, IndexError) as error:
            said = str(error).splitlines()[0]
            if "height" in said:
                raise ValueError(
                    f"teacher.size {list(setting.size)} is none that {pipeline.__name__} draws at ({said})"
                ) from error
            check_count(scheduler, steps)
            raise ValueError(
                f"{type(scheduler).__name__} cannot make {steps} steps ({said}); choose another step count"
            ) from error
    return times


def check_count(scheduler: Any, steps: int) -> None:
    """Raises ValueError where a scheduler that has refused to make some steps makes fewer: Diffusers names, in its own words,
    arguments that nobody has given."""
    most = scheduler.config.get("original_inference_steps") or scheduler.config.get("num_train_timesteps", steps)
    if steps > most:
        raise ValueError(f"{type(scheduler).__name__} cannot make {steps} steps, {most} at most; choose another step count")


def falling(schedule: NoiseSchedule, seen: Sequence[float], steps: int) -> tuple[float, ...]:
    """Model times as t. Raises ValueError if they are not `steps` falling ones."""
    times = schedule.t_of_model_time(torch.tensor(seen, dtype=torch.float64)).tolist()
    if len(times) != steps or any(b >= a for a, b in pairwise(times)):
        raise ValueError(
            f"the deployed scheduler cannot make {steps} falling steps (it made {len(times)}); choose another step count"
        )
    return tuple(times)
