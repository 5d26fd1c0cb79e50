"""Every registered objective, and each of them judged by heads."""

from dataclasses import replace

from fewstep.objectives import objectives
from fewstep.objectives.adversarial import Adversarial

# What the registry holds, and each of it that trains no heads itself judged by heads on either backbone.
INNER = [name for name in objectives() if name != "adversarial"]
HEADED = [name for name in INNER if any("heads" in turn.movers for turn in objectives()[name]().round(0))]
JUDGED = [name for name in INNER if name not in HEADED]
EVERY = [*objectives(), *(f"{heads}+{name}" for heads in ("dmd2", "ladd") for name in JUDGED)]


def made(name, steps=2, **options):
    """An objective by name; "dmd2+NAME" is that one with heads, and a wrapper alone wraps its default."""
    heads, _, name = name.rpartition("+")
    kind = objectives()[name]
    if heads:
        return Adversarial(inner=kind(steps=steps), heads=heads)
    return kind(inner=replace(kind().inner, steps=steps)) if "inner" in kind.__dataclass_fields__ else kind(steps=steps)
