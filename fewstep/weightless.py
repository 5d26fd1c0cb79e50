"""A teacher as its folder's configs tell it, every network there but without memory for its weights."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import hub
from fewstep.adapters import Teacher, teacher_of
from fewstep.families import family_of
from fewstep.folders import pipeline_name, teacher_folder


def weightless() -> FakeTensorMode:
    """While it is entered, tensors are made without memory; they compute shapes alone, together with true ones as well."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def bare(net: nn.Module) -> None:
    """Puts a network's tensors on the meta device, where roles can be made of it."""
    _replace(net, lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"))


def pretend(net: nn.Module, mode: FakeTensorMode) -> None:
    """Gives a network tensors without memory in place of what it has."""
    with mode:
        _replace(net, lambda x: torch.empty(x.shape, dtype=x.dtype))


def _replace(net: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Puts other tensors in the place of parameters and buffers; what was shared is shared again."""
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # with the old ones, so that no other is given their place meanwhile
    for module in net.modules():
        for key, p in module._parameters.items():
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = p, nn.Parameter(make(p), requires_grad=p.requires_grad)
                module._parameters[key] = made[id(p)][1]
        for key, x in module._buffers.items():
            if x is not None:
                module._buffers[key] = make(x)


def weightless_teacher(
    path: str, mode: FakeTensorMode, *, size: tuple[int, ...] | None = None, guidance: float | None = None
) -> Teacher:
    """The teacher at a path with its tokenizers and its scheduler, and networks without weights; see `load_teacher`. Of a hub id
    that the cache does not know its configs are fetched, and no weights.

    Raises ValueError where these cannot be had, or do not say what its parts are."""
    folder = teacher_folder(path) or hub.configs(path)
    name = pipeline_name(folder)
    family_of(name)
    kind = getattr(diffusers, name)
    index = json.loads((folder / "model_index.json").read_text())
    parts = {k: _part(folder, k, v[0], v[1], mode) for k, v in index.items() if isinstance(v, list) and len(v) == 2}
    takes = inspect.signature(kind.__init__).parameters
    with mode:  # some pipelines compute with their networks' configs
        pipe = kind(**{k: v for k, v in (index | parts).items() if k in takes})
    return teacher_of(path, pipe, size=size, guidance=guidance)


def _part(folder: Path, name: str, library: str | None, kind: str | None, mode: FakeTensorMode) -> Any:
    """One component of a pipeline. Raises ValueError where its files are missing or damaged."""
    if kind is None:
        return None
    homes = (diffusers, transformers, getattr(diffusers.pipelines, library or "", None))
    found = next((getattr(home, kind) for home in homes if hasattr(home, kind)), None)
    try:
        if found is None:
            raise ValueError(f"{kind} is known neither to Diffusers nor to Transformers")
        if not issubclass(found, nn.Module):
            return found.from_pretrained(folder / name, local_files_only=True)
        with mode:
            if issubclass(found, transformers.PreTrainedModel):
                config = found.config_class.from_pretrained(folder / name, local_files_only=True)
                return found._from_config(config, dtype=torch.float32)
            return found.from_config(found.load_config(folder / name, local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        file = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        said = str(error).splitlines()[0][:80]
        raise ValueError(f"{file} is missing or damaged ({said}); save the pipeline again with pipe.save_pretrained") from error


class TrueMasks(TorchDispatchMode):
    """While it is entered, a true mask picks rows of a weightless tensor by their numbers, which are known."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:
            x, places = args
            args = (x, [place for mask in places for place in _numbers(mask)])
        return func(*args, **(kwargs or {}))


def _numbers(place: Tensor | None) -> list[Tensor | None]:
    masking = type(place) is Tensor and place.dtype == torch.bool
    return list(place.nonzero().unbind(1)) if masking else [place]  # type: ignore[union-attr]


@contextmanager
def quiet() -> Iterator[None]:
    """What pipelines say of prompts that they cut is not about the user's; what does not fit is said in one sentence."""
    loggers = diffusers.utils.logging, transformers.utils.logging
    shapes = logging.getLogger(torch._subclasses.fake_tensor.__name__)
    was = shapes.disabled
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    shapes.disabled = True
    try:
        yield
    finally:
        shapes.disabled = was
        for logger, level in zip(loggers, before, strict=True):
            logger.set_verbosity(level)
