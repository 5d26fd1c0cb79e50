"""fewstep distils multi-step diffusion and flow models into generators of one to four steps.

`import fewstep` is cheap: a public name loads its module, and torch with it, when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.adapters import load_teacher
    from fewstep.api import Run
    from fewstep.distillation import distill

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "distill", "load_teacher"]

_HOMES = {"distill": "fewstep.distillation", "Run": "fewstep.api", "load_teacher": "fewstep.adapters"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
