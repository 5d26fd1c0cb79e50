"""CLIP score: how well images fit their prompts, through any open_clip model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fewstep.evaluation.features import device_of, exact, open_clip_model
from fewstep.evaluation.images import check


def tokenize(tokenizer: Callable[[list[str]], torch.Tensor], prompts: list[str]) -> torch.Tensor:
    """Token ids (N, context); a text too long for the context is cut and ends in the end-of-text token all the same.

    Without that token the text feature is read from a random word: 26.2 became 17.0 (torchmetrics issue 2883).
    """
    tokens = tokenizer(prompts)
    inner = getattr(tokenizer, "tokenizer", None)
    end = getattr(tokenizer, "eot_token_id", None) or getattr(inner, "eos_token_id", None)
    if end is not None:
        tokens[~(tokens == end).any(1), -1] = end
    return tokens


class ClipScore:
    """Cosine of image and prompt embeddings, times 100; no prefix, no clipping at zero, no logit scale.

    The id says all of that and names model, weights and resize. Raises ValueError as `features.open_clip_model` does.
    """

    def __init__(
        self, name_or_folder: str | Path, pretrained: str | None = None, *, device: str | None = None, batch: int = 64
    ) -> None:
        self._clip = open_clip_model(str(name_or_folder), pretrained, device)
        self._batch = batch
        self.id = f"clip[{self._clip.id},prefix=none,scale=100,truncation=keep-eot]"

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Scores (N,) float32 in [-100, 100] of images (N, H, W, 3) uint8 and their prompts; average them over images."""
        check(images)
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts; give one prompt an image")
        model, device = self._clip.model, device_of(self._clip.model)
        texts = list(dict.fromkeys(prompts))
        place = {text: i for i, text in enumerate(texts)}
        with exact(model, device):
            words = torch.cat(
                [
                    model.encode_text(tokenize(self._clip.tokenizer, texts[i : i + self._batch]).to(device), normalize=True)
                    for i in range(0, len(texts), self._batch)
                ]
            )
            found = []
            for i in range(0, len(images), self._batch):
                pictures = model.encode_image(self._clip.prepare(images[i : i + self._batch]).to(device), normalize=True)
                mine = words[[place[p] for p in prompts[i : i + self._batch]]]
                found.append((pictures * mine).sum(1))
        return 100 * torch.cat(found).float().cpu().numpy()
