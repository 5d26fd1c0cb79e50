"""Exponential moving average of a player's weights, always in float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """Shadows of named weights. A bfloat16 shadow at decay 0.999 would never move, hence float32 whatever the weights are."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema is a decay in [0, 1), not {decay}; 0 keeps the last weights")
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], updates: int) -> None:
        """Moves towards the weights; after n updates the decay is at most (1 + n) / (10 + n), so early noise is forgotten."""
        decay = min(self.decay, (1 + updates) / (10 + updates)) if self.decay else 0.0
        torch._foreach_lerp_(list(self.shadow.values()), [weights[k].detach().float() for k in self.shadow], 1 - decay)
