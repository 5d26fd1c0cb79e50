"""A student whose network is told where its jump ends: `told.load(EXPORT)` is a stock pipeline that tells it, in any step count.

Imports Diffusers and nothing of fewstep: this is what a deployer copies, and every export that needs it has it inside. The
exported network takes every jump for one to the clean end, so that one step needs no telling. Another end changes its time
embedding, by what the end's own embedder, a file of the export, makes of it.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_timestep_embedding
from safetensors.torch import load_file
from torch import Tensor, nn


def load(export: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of an export, whose network is told at each step where its scheduler will go."""
    export = Path(export)
    facts = json.loads((export / "fewstep.json").read_text("utf-8"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(export, dtype=dtype, use_safetensors=True)
    ends, net = facts["ends"], getattr(pipe, facts["components"][0])
    teller = Teller(pipe, net, load_file(export / ends["file"]), ends["clock"])
    net.register_forward_pre_hook(teller.hear, with_kwargs=True)
    net.get_submodule(ends["module"]).register_forward_hook(teller.tell)
    return pipe


class Teller:
    """Hears at what time a network is asked (`hear`, before it runs), and tells its time embedding where the jump ends (`tell`).

    weights: of the end's embedder, two linear layers. clock: what the network is fed at clean data and at pure noise."""

    def __init__(self, pipe: Any, net: Any, weights: dict[str, Tensor], clock: tuple[float, float]) -> None:
        self.pipe, self.signature, self.weights, self.clock = pipe, inspect.signature(net.forward), weights, clock
        self.end = 0.0

    def hear(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = self.signature.bind(*args, **kwargs).arguments
        time = torch.as_tensor(values["timestep"] if "timestep" in values else values["t"]).flatten()[0]
        clean, noise = self.clock
        self.end = after((float(time) - clean) / (noise - clean), self.pipe.scheduler)

    def tell(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out + (self.embedded(self.end) - self.embedded(0.0)).to(out)

    def embedded(self, end: float) -> Tensor:
        w = self.weights
        waves = get_timestep_embedding(1000 * torch.tensor([end]), w["0.weight"].shape[1])
        hidden = nn.functional.silu(nn.functional.linear(waves, w["0.weight"], w["0.bias"]))
        return nn.functional.linear(hidden, w["2.weight"], w["2.bias"])


def after(t: float, scheduler: Any) -> float:
    """The time at which the step from t ends, 0 after the last one. Times fall from 1 (noise) to 0 (clean)."""
    # Diffusion counts its levels from 0, and clean lies one below them; the clock of a flow begins at clean.
    first = 1 if hasattr(scheduler, "alphas_cumprod") else 0
    times = [(time + first) / scheduler.config.num_train_timesteps for time in scheduler.timesteps.tolist()]
    # A time that was rounded to the picture's dtype is still the one it was.
    here = min(range(len(times)), key=lambda i: abs(times[i] - t))
    return [*times, 0.0][here + 1]
