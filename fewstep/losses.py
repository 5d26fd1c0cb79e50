"""Per-sample mathematics of losses: tensors in, (B,) out; nothing here samples, calls a network or reduces over a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def flat_mean(x: Tensor) -> Tensor:
    """Mean over all but the batch axis, (B,), at least float32."""
    return (x if x.dtype == torch.float64 else x.float()).flatten(1).mean(1)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each sample (B,)."""
    return flat_mean((_wide(a) - _wide(b)).square())


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Elementwise sqrt(d^2 + c^2) - c, averaged over each sample (B,) (LCM, official script; c = 0.001 there)."""
    return flat_mean(((_wide(a) - _wide(b)).square() + c * c).sqrt() - c)


def push(x: Tensor, direction: Tensor) -> Tensor:
    """A surrogate (B,) whose gradient in x is exactly `direction` / (elements of a sample).

    Its value is half the mean square of the direction. The usual form 0.5 (x - sg(x - direction))^2 subtracts the direction
    from x first: in bf16 that loses up to 80 % of it (DMD, eq. 7)."""
    direction = _wide(direction.detach())
    pull = flat_mean(_wide(x) * direction)
    return 0.5 * flat_mean(direction.square()) + pull - pull.detach()


def normalised(direction: Tensor, x: Tensor, real: Tensor, floor: float = 1e-4) -> Tensor:
    """direction over the mean absolute distance of x to the teacher's x0, a number a sample (DMD, eq. 8). All detached."""
    scale = flat_mean((_wide(x) - _wide(real)).abs()).clamp_min(floor).detach()
    return direction / scale.reshape(-1, *([1] * (x.ndim - 1)))


def non_saturating(fake: Tensor) -> Tensor:
    """Generator's loss softplus(-D(fake)), shaped like the logits (Goodfellow et al. 2014)."""
    return F.softplus(-fake)


def logistic(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator's loss softplus(-D(real)) + softplus(D(fake))."""
    return F.softplus(-real) + F.softplus(fake)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
