"""The zoo's yardstick: a small open_clip model of the sprites world, in a folder that open_clip's `local-dir:` schema loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from open_clip import CLIP
from safetensors.torch import save_file

from fewstep.zoo.sprites import SIDE
from fewstep.zoo.training import train
from fewstep.zoo.words import TOLD, clip_tokenizer

_CONTEXT = 26  # tokens of the longest caption that states textures and sky
_MEAN, _STD = 0.48, 0.30
# Most noise a training image gets, of a range of 1: drawings have none, and a tower that never saw any puts noise of 10/255
# at six times the Frechet distance of a world of circles alone (7,589 to 1,334).
_GRAIN = 0.03


def config() -> dict:
    """What `open_clip_config.json` says: a ModifiedResNet for 64x64 images and a two-layer text transformer, 128 features."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": SIDE, "layers": [1, 2, 2, 1], "width": 16, "head_width": 64},
            "text_cfg": {
                "context_length": _CONTEXT,
                "vocab_size": len(clip_tokenizer(words=TOLD)),
                "hf_tokenizer_name": "sprites-clip",  # any name: with local-dir open_clip reads the tokenizer in the folder
                "width": 128,
                "heads": 4,
                "layers": 2,
            },
        },
        "preprocess_cfg": {"mean": [_MEAN] * 3, "std": [_STD] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
    }


def make(seed: int = 0) -> CLIP:
    """An untrained model, the same for the same seed, 1.9 M parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(**config()["model_cfg"])


def save(model: CLIP, folder: Path) -> None:
    """Writes the folder that `open_clip.create_model_and_transforms("local-dir:...")` reads: config, tokenizer, weights.

    Matrices and kernels are stored in half precision; norms, biases and running statistics stay float32."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config(), indent=2) + "\n")
    clip_tokenizer(_CONTEXT, TOLD).save_pretrained(folder)
    weights = {k: (v.half() if v.ndim > 1 else v).detach().clone().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, 64, 64, 3) to what the image tower wants, float (n, 3, 64, 64) in channels-last memory, the values those of the
    folder's own transform."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD


def contrastive_loss(logits: torch.Tensor, match: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy of logits (images, texts), spread evenly over all pairs that `match`, a boolean of that shape."""
    match = match.to(logits.dtype)
    by_image = -(match / match.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    by_text = -(match / match.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (by_image + by_text) / 2


def train_clip(folder: Path, steps: int, batch: int, images: np.ndarray, captions: tuple[list[str], list[str]]) -> CLIP:
    """The trained model, in eval mode; resumes from `folder`.

    images: uint8 (n, 64, 64, 3). captions: their ordinary captions and those that also state textures, n each; every sample
    draws one of the two, and counts as a match for each text of the batch that is literally one of its own two."""
    model, tokenizer = make(), clip_tokenizer(_CONTEXT, TOLD)
    ids = [torch.tensor(tokenizer(texts, padding="max_length", truncation=True).input_ids) for texts in captions]
    tokens = torch.stack(ids, 1)  # (n, 2, context)
    names = torch.from_numpy(np.unique(np.concatenate(captions), return_inverse=True)[1]).reshape(2, -1).T  # (n, 2)

    def loss(step: int, rng: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(images), (batch,), generator=rng)
        kind = torch.randint(2, (batch,), generator=rng)
        x = pixels(images[rows.numpy()])
        grain = _GRAIN / _STD * torch.rand(batch, 1, 1, 1, generator=rng)
        x += grain * torch.randn(batch, SIDE, SIDE, 3, generator=rng).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            seen = model.encode_image(x)
            read = model.encode_text(tokens[rows, kind])
        seen, read = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (seen, read))
        match = names[rows][:, kind] == names[rows, kind]
        return contrastive_loss(model.logit_scale.clamp(max=np.log(100)).exp() * seen @ read.T, match)

    return train("clip", model, loss, folder=folder, steps=steps, lr=2e-3, weight_decay=0.02)
