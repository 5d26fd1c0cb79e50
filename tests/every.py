"""Every registered objective, and each of them judged by heads."""

from dataclasses import replace

from fewstep.objectives import objectives
from fewstep.objectives.adversarial import Adversarial

# What the registry holds, and each of it judged by heads on either backbone, or by its own where it has some.
INNER = [name for name in objectives() if name != "adversarial"]
HEADED = [name for name in INNER if "heads" in objectives()[name]().needs.roles]
EVERY = [*objectives(), *(f"dmd2+{name}" for name in INNER), *(f"ladd+{name}" for name in INNER if name not in HEADED)]


def made(name, steps=2, **options):
    """An objective by name; "dmd2+NAME" is that one with heads, and a wrapper alone wraps its default."""
    heads, _, name = name.rpartition("+")
    kind = objectives()[name]
    if "inner" in kind.__dataclass_fields__:
        return kind(inner=replace(kind().inner, steps=steps))
    return Adversarial(inner=kind(steps=steps), heads=heads) if heads else kind(steps=steps)
