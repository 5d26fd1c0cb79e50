"""The deployed grid: a stock pipeline's own loop is run once, and the times its network is fed are noted. Never typed twice."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from fewstep.schedules import NoiseSchedule


class _Recorder(nn.Module):
    """Stands in for the network while the pipeline's loop runs: notes the times it is fed, answers zeros."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.config, self.dtype, self.device = net.config, torch.float32, torch.device("cpu")
        self.in_channels = net.config["in_channels"]
        self.times: list[float] = []
        self.signature = inspect.signature(net.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Transformer2DModelOutput:
        values = self.signature.bind(*args, **kwargs).arguments
        time = values.get("timestep", values.get("t"))
        self.times.append(float(torch.as_tensor(time).flatten()[0]))
        x: Any = values.get("sample", values.get("hidden_states", values.get("x")))
        out: Any = [torch.zeros_like(v) for v in x] if isinstance(x, list) else torch.zeros_like(x)
        return Transformer2DModelOutput(sample=out)


class _Vae(nn.Module):
    """The configuration of an autoencoder, which is all that a pipeline's loop asks of it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.dtype, self.device = FrozenDict(config), torch.float32, torch.device("cpu")


def seen_times(
    pipeline: Any, component: str, net: Any, vae: Any, scheduler: Any, steps: int, words: dict[str, Any]
) -> list[float]:
    """The times the network is fed in `steps` steps of a pipeline class. `net` and `vae` (a config) lend their configs only, so
    that neither needs weights; `words` are the keyword arguments in place of a prompt."""
    takes = inspect.signature(pipeline.__init__).parameters
    parts: dict[str, Any] = {name: None for name, p in takes.items() if name != "self" and p.default is inspect.Parameter.empty}
    parts |= {"requires_safety_checker": False} if "requires_safety_checker" in takes else {}
    recorder = _Recorder(net)
    parts |= {component: recorder, "scheduler": scheduler}
    call: dict[str, Any] = {"num_inference_steps": steps, **words}
    if vae:
        parts["vae"] = _Vae(vae)
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        call |= {"height": 2 * factor, "width": 2 * factor}
    probe = pipeline(**parts)
    probe.set_progress_bar_config(disable=True)
    try:
        probe(**call)
    except (ValueError, ArithmeticError, IndexError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{type(scheduler).__name__} cannot make {steps} steps ({said}); choose another step count") from error
    return recorder.times


def falling(schedule: NoiseSchedule, seen: Sequence[float], steps: int) -> tuple[float, ...]:
    """Model times as t. Raises ValueError if they are not `steps` falling ones."""
    times = schedule.t_of_model_time(torch.tensor(seen, dtype=torch.float64)).tolist()
    if len(times) != steps or any(b >= a for a, b in pairwise(times)):
        raise ValueError(
            f"the deployed scheduler cannot make {steps} falling steps (it made {len(times)}); choose another step count"
        )
    return tuple(times)
