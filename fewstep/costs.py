"""What training costs: passes of each network, activations kept for backward, peak memory. Counting waits for no device."""

from __future__ import annotations

import resource
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle


class Passes:
    """Counts, while entered, the rows that named networks are run on: (name, whether a graph is kept) -> rows, one entry a pass.

    A graph is kept where autograd is on and a weight or an input asks for a gradient; such a pass is followed by a backward."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.networks, self.made = dict(networks), Counter[tuple[str, bool, int]]()
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Passes:
        for name, net in self.networks.items():
            self._hooks.append(net.register_forward_pre_hook(self._note(name), with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _note(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [x for x in _tensors((args, kwargs)) if x.is_floating_point()]
            graph = torch.is_grad_enabled() and any(x.requires_grad for x in (*module.parameters(), *given))
            self.made[name, graph, _rows(args, kwargs)] += 1

        return note

    def take(self, batch: int, rounds: int) -> dict[str, float]:
        """Passes of `batch` rows a round since the last call: `passes/NAME`, and of them `passes/NAME_backward` with a graph."""
        found = {f"passes/{name}{end}": 0.0 for name in self.networks for end in ("", "_backward")}
        for (name, graph, rows), times in self.made.items():
            for key in (f"passes/{name}", *([f"passes/{name}_backward"] if graph else [])):
                found[key] += times * rows / batch / rounds
        self.made.clear()
        return {k: v for k, v in found.items() if v or not k.endswith("_backward")}


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Rows of the network's first argument, which in some families is a list with a tensor a row."""
    first = args[0] if args else next(iter(kwargs.values()))
    return len(first)


def saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps between forward and backward of `run`, weights and other leaves left out."""
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not x.is_leaf:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = run()
    del kept  # held until here, so that no storage is counted under another's address
    return sum(seen.values())


class Ledger(TorchDispatchMode):
    """Counts the bytes of tensors that are alive: of those it is shown, and while it is entered of all that are made.

    held: now; peak: at most since the last `highest` began; gradients: those of them at that moment that lay in `.grad` of
    parameters that `mark` was told of. What a kernel takes for itself and an allocator rounds up is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.peak, self.gradients = 0, 0, 0
        self._there: dict[int, weakref.ref[Any]] = {}
        self._gradients = 0

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Counts tensors, until they are gone, and returns the bytes of those it did not know; what is shared counts once."""
        before = self.held
        for x in tensors:
            self._note(x)
        return self.held - before

    def mark(self, parameters: Iterable[Tensor]) -> None:
        """Says whose gradients are to be told apart."""

        def arrived(p: Tensor) -> None:
            self._gradients += p.numel() * p.element_size()

        for p in parameters:
            p.register_post_accumulate_grad_hook(arrived)

    def highest(self, run: Callable[[], Any]) -> int:
        """The most that is held while `run` runs."""
        self.peak, self.gradients, self._gradients = self.held, 0, 0
        run()
        return self.peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in _tensors(out):
            self._note(x)
        return out

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._there:
            return

        def gone(_: Any) -> None:
            del self._there[key]
            self.held -= size

        self._there[key] = weakref.ref(storage, gone)
        self.held += size
        if self.held > self.peak:
            self.peak, self.gradients = self.held, self._gradients


def forget_peak() -> None:
    """Lets `peak_gb` count from now on. A process's own peak can be forgotten on Linux alone."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes what is resident now


def peak_gb() -> float:
    """Most memory held since `forget_peak`, in 1e9 bytes: of the CUDA device where there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
