"""Feature extractors: uint8 images in, float32 vectors out, each with an id that names network, weights and resize kernel."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.devices import default_device
from fewstep.evaluation.images import check

INCEPTION = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


@contextmanager
def exact(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradient, no autocast, no TF32: a score must not depend on what surrounds the call."""
    module.eval()
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)


@dataclass(frozen=True)
class Extractor:
    """Images (N, H, W, 3) uint8 to features (N, d) float32. Raises ValueError for another dtype, shape or range.

    prepare: a batch of such images to the network's input; forward: that input to features; module: what both run on.
    """

    id: str
    module: torch.nn.Module = field(repr=False)
    prepare: Callable[[np.ndarray], torch.Tensor] = field(repr=False)
    forward: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)
    batch: int = 64

    def __call__(self, images: np.ndarray) -> np.ndarray:
        check(images)
        device = device_of(self.module)
        found = []
        with exact(self.module, device):
            for start in range(0, len(images), self.batch):
                x = self.prepare(images[start : start + self.batch]).to(device)
                found.append(self.forward(x).flatten(1).float().cpu().numpy())
        return np.concatenate(found)


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module's first tensor lives; cpu if it has none."""
    tensor = next(iter(module.state_dict().values()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def weights_sha(module: torch.nn.Module) -> str:
    """First 12 hex digits of the sha256 of everything in a module's state dict: what was loaded, not what a file claims."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:12]


def channels_first(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) to a contiguous tensor (N, 3, H, W), uint8."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous()


def module_features(module: torch.nn.Module, id: str, *, batch: int = 64) -> Extractor:
    """Any network as an extractor: it is fed float32 (N, 3, H, W) in [0, 1] at the images' own size and returns (N, d).

    The id gains the hash of its weights.
    """
    return Extractor(f"{id}:{weights_sha(module)}:native", module, lambda x: channels_first(x).float() / 255, module, batch)


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model in eval mode: both towers, its stock preprocessing, its tokenizer, and an id of all of them."""

    id: str
    model: Any  # a module with encode_image, encode_text and visual
    preprocess: Callable[[Any], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]

    def prepare(self, images: np.ndarray) -> torch.Tensor:
        """(N, H, W, 3) uint8 through the model's own PIL resize and normalisation: (N, 3, h, w) float32."""
        from PIL import Image

        return torch.stack([self.preprocess(Image.fromarray(image)) for image in images])


@lru_cache(maxsize=2)
def open_clip_model(name_or_folder: str, pretrained: str | None = None, device: str | None = None) -> OpenClip:
    """Loads a folder written for open_clip's 'local-dir:' schema, or a built-in architecture with a weights file or tag.

    A tag downloads, everything else stays offline. Raises ValueError where open_clip would go on with random weights.
    """
    import open_clip

    folder = Path(name_or_folder)
    name = name_or_folder
    if folder.is_dir():
        if not any(f.suffix in (".safetensors", ".bin", ".pth") for f in folder.iterdir()):
            raise ValueError(f"{folder} holds no weights; expected open_clip_model.safetensors beside open_clip_config.json")
        name, pretrained, label = f"local-dir:{folder}", None, folder.resolve().name
    elif name not in open_clip.list_models():
        raise ValueError(f"{name!r} is neither a folder nor an architecture of open_clip; see open_clip.list_models()")
    elif pretrained is None:
        raise ValueError(f"open_clip {name!r} needs weights; give a file, as in open_clip:{name}:/path/to/weights.safetensors")
    elif not Path(pretrained).is_file() and pretrained not in open_clip.list_pretrained_tags_by_model(name):
        raise ValueError(f"{pretrained!r} is neither a file nor a weights tag of open_clip {name!r}; correct the path")
    else:
        label = name
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained, device=device or default_device())
    except (OSError, RuntimeError) as error:
        raise ValueError(f"open_clip cannot load {name_or_folder}: {error}") from error
    cfg = model.visual.preprocess_cfg
    size = cfg["size"][0] if isinstance(cfg["size"], (tuple, list)) else cfg["size"]
    kernel = f"pil-{cfg['interpolation']}-{cfg['resize_mode']}-{size}"
    id = f"{label}:{weights_sha(model)}:{kernel}"
    return OpenClip(id, model.eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(name))


def open_clip_features(
    name_or_folder: str | Path, pretrained: str | None = None, *, device: str | None = None, batch: int = 64
) -> Extractor:
    """Unnormalised image features of an open_clip model (see `open_clip_model`)."""
    clip = open_clip_model(str(name_or_folder), pretrained, device)
    return Extractor(f"open_clip:{clip.id}", clip.model, clip.prepare, clip.model.encode_image, batch)


def inception_features(
    weights: str | Path | None, *, random: bool = False, device: str | None = None, batch: int = 64
) -> Extractor:
    """Pool3 features (2048) of the 2015 Inception graph with its TF1 resize to 299, as torch-fidelity ports it.

    weights: a file, or None for where torch-fidelity keeps it. random: seeded random weights, for tests of the plumbing alone.
    Raises ValueError without a weights file: it is never fetched.
    """
    if weights is None and not random:
        weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rpartition("/")[2]
        if not weights.is_file():
            raise ValueError(
                f"Inception features need their weights file: put {INCEPTION} into {weights.parent}, or name it, as in"
                " extractor: inception:/path/to/weights.pth"
            )
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"there is no Inception weights file {weights}; correct the path")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError("Inception features need torch-fidelity: pip install torch-fidelity") from error

    class Bare(FeatureExtractorInceptionV3):
        """The same network, built empty: its constructor would unpickle the file with weights_only=False."""

        def load_state_dict(self, state, strict=True, assign=False):
            if not state:
                return None
            return super().load_state_dict(state, strict=strict, assign=assign)

    state = _state(Path(weights)) if weights is not None else None
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Bare("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing)
    if state is not None:
        module.load_state_dict(state)
    module = module.to(device or default_device())
    name = "inception-tf1" if weights is not None else "inception-tf1-random"
    return Extractor(f"{name}:{weights_sha(module)}", module, channels_first, lambda x: module(x)[0], batch)


def _state(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, or of a torch file that holds nothing but tensors."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def resolve(name: str, *, device: str | None = None, batch: int = 64) -> Extractor:
    """The extractor that a protocol names: zoo:NAME, open_clip:FOLDER, open_clip:ARCHITECTURE:WEIGHTS or inception[:WEIGHTS]."""
    kind, _, rest = name.partition(":")
    if kind in ("zoo", "open_clip") and rest:
        return open_clip_features(*clip_source(name), device=device, batch=batch)
    if kind == "inception":
        return inception_features(rest or None, device=device, batch=batch)
    raise ValueError(f"{name!r} names no extractor; use zoo:sprites-clip, open_clip:ViT-B-32:WEIGHTS or inception")


def clip_source(name: str) -> tuple[str, str | None]:
    """(folder or architecture, weights or None) of 'zoo:NAME', 'open_clip:FOLDER' or 'open_clip:ARCHITECTURE:WEIGHTS'."""
    kind, _, rest = name.partition(":")
    if kind == "zoo" and rest:
        from fewstep import zoo

        return str(zoo.folder(rest)), None
    if kind == "open_clip" and rest:
        first, _, weights = rest.partition(":")
        return first, weights or None
    raise ValueError(f"{name!r} names no open_clip model; use zoo:sprites-clip or open_clip:ViT-B-32:WEIGHTS")
