"""One file a method; importing this package makes all of them known."""

from fewstep.objectives import consistency, dmd
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, objectives, register

__all__ = ["Batch", "Losses", "Needs", "Nets", "Objective", "Turn", "consistency", "dmd", "objectives", "register"]
