"""The Hugging Face hub, as far as it is read: the configs of a teacher that somebody named by its id."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

# What the hub's client raises: its HTTP library's errors (no net), the system's (no token, told to be offline), and its own.
REFUSALS: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, HFValidationError)
CONFIGS = ("*.json", "*.txt", "*.model", "*.jinja")  # tokenizers are the last three, with some of the first


def configs(hub_id: str) -> Path:
    """The folder in the Hugging Face cache with a pipeline's configs and tokenizers. They are fetched where the cache has not all
    of them, and no weights ever. Raises ValueError where that cannot be done."""
    for cached in (True, False):
        try:
            folder = Path(snapshot_download(hub_id, allow_patterns=list(CONFIGS), local_files_only=cached))
            if _whole(folder):
                return folder
            said = f"{folder} is not a whole Diffusers pipeline"
        except REFUSALS as error:
            said = str(error).strip().splitlines()[0].rstrip(".")
    remedy = "check the id and the network, log in where the model is gated (`hf auth login`), or give a folder"
    raise ValueError(f"the configs of {hub_id} are not in the Hugging Face cache and cannot be fetched ({said}); {remedy}")


def _whole(folder: Path) -> bool:
    """Whether a snapshot has an index and something of each part that the index names: other commands fetch single files."""
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        return all((folder / k).is_dir() for k, v in index.items() if isinstance(v, list) and None not in v)
    except (OSError, ValueError, AttributeError):
        return False
