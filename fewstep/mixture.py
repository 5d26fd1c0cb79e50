"""Names on disk of an exported student of several experts: a LoRA or a network each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PIPELINE = "phased.py"  # what hands over between them
LORA_FILE = "pytorch_lora_weights.safetensors"


def lora_files(phases: int, components: Sequence[str]) -> dict[str, str]:
    """The LoRA file of each adapter; the usual one where there is one expert, and one for each further component of a teacher."""
    if phases == 1:
        return {"default": LORA_FILE, **{name: f"{name}_lora_weights.safetensors" for name in components[1:]}}
    return {f"expert_{k}": f"expert_{k}.safetensors" for k in range(phases)}


def folders(phases: int) -> dict[str, str]:
    """The folder of each expert's network: the first is the pipeline's own."""
    return {f"expert_{k}": f"experts/{k}" if k else "" for k in range(phases)}


def facts(times: Sequence[float], files: Mapping[str, str]) -> dict[str, Any]:
    """What `phased.py` reads: files by adapter, the trained times (as the network is fed them) at which experts 1, 2, ... begin,
    and the largest, negative where these times rise towards clean data."""
    each = len(times) // len(files)
    begins = [times[k * each] for k in range(1, len(files))]
    clock = max(map(abs, times)) * (1 if times[0] > times[-1] else -1)
    return {"files": dict(files), "switches": begins, "clock": clock}
