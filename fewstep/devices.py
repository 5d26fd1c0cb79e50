"""Where pictures are drawn and judged."""

from __future__ import annotations

import torch


def default_device() -> str:
    """The first GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
