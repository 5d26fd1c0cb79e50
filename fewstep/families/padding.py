"""Texts that pipelines pad to hundreds of tokens: as many of these as a batch needs."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.denoiser import Cond


def masked(embeds: Tensor, mask: Tensor) -> Cond:
    """Embeddings whose tokens from some place on are padding, with how many are not."""
    return Cond({"prompt": embeds, "length": mask.sum(1).long().cpu()})


def unpadded(cond: Cond) -> tuple[Tensor, Tensor]:
    """The embeddings (B, L, width) of prompts with lengths and their mask (B, L), 1 and 0, up to the batch's longest prompt.

    A network that masks its padding attends to none of it, and most prompts are a tenth of the tokens that pipelines pad to."""
    words, lengths = cond.tensors["prompt"], cond.tensors["length"]
    longest = int(lengths.max()) if lengths.min() > 0 else words.shape[1]  # who has no token attends to all padding alike
    mask = torch.arange(longest)[None] < lengths[:, None]
    return words[:, :longest], mask.to(words.device, words.dtype, non_blocking=True)
