"""One file a method; importing this package makes all of them known."""

from importlib import import_module
from pkgutil import iter_modules

from fewstep.objectives.base import Batch, Judge, Losses, Needs, Nets, Objective, Turn, objectives, register

for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")

__all__ = ["Batch", "Judge", "Losses", "Needs", "Nets", "Objective", "Turn", "objectives", "register"]
