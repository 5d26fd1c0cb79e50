"""Per-sample mathematics of losses: tensors in, (B,) out; nothing here samples, calls a network or reduces over a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


def sample_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt(|d|^2 + c^2) - c of whole samples (B,), |d| the Euclidean norm (iCT, arXiv 2310.14189; c = 0 is the norm)."""
    d = _wide(a) - _wide(b)
    return (d.square().flatten(1).sum(1) + max(c * c, 1e-16)).sqrt() - c


def snr_weight(alpha: Tensor, sigma: Tensor) -> Tensor:
    """max(alpha^2 / sigma^2, 1): makes x0's squared error the larger of x0's and eps's (Salimans and Ho 2022, section 4)."""
    return (alpha / sigma).square().clamp_min(1)


def push(x: Tensor, direction: Tensor) -> Tensor:
    """A surrogate (B,) whose gradient in x is exactly `direction` / (elements of a sample).

    Its value is half the mean square of the direction. The usual form 0.5 (x - sg(x - direction))^2 subtracts the direction
    from x first: in bf16 that loses up to 80 % of it (DMD, eq. 7)."""
    direction = _wide(direction.detach())
    pull = flat_mean(_wide(x) * direction)
    return 0.5 * flat_mean(direction.square()) + pull - pull.detach()


def distance(x: Tensor, real: Tensor, floor: float = 1e-4) -> Tensor:
    """Mean absolute distance (B,) of x to the teacher's x0, at least `floor`, without a graph (DMD, eq. 8; SiD's code)."""
    return flat_mean((_wide(x) - _wide(real)).abs()).clamp_min(floor).detach()


def normalised(direction: Tensor, x: Tensor, real: Tensor, floor: float = 1e-4) -> Tensor:
    """direction over the distance of x to the teacher's x0, a number a sample (DMD, eq. 8). All detached."""
    return direction / distance(x, real, floor).reshape(-1, *([1] * (x.ndim - 1)))


def unit(direction: Tensor, floor: float) -> Tensor:
    """direction / (its root mean square in each sample + floor): tangent normalisation, independent of the resolution (sCM,
    arXiv 2410.11081, section 4.1)."""
    scale = flat_mean(direction.square()).sqrt() + floor
    return direction / scale.reshape(-1, *([1] * (direction.ndim - 1)))


def tamed(x: Tensor, direction: Tensor, floor: float, power: float) -> Tensor:
    """`push` (B,) weighed by (mean square of the direction + floor)^-power: with power 1 a far sample's gradient shrinks, with
    1/2 all have one size (MeanFlow, arXiv 2505.13447, section 4.3, which takes the sum, not the mean, of squares)."""
    return push(x, direction) * (flat_mean(direction.detach().square()) + floor) ** -power


def moments_kl(x: Tensor, mean: float, std: float) -> Tensor:
    """KL(N(m, s^2) || N(mean, std^2)) of the mean m and the spread s of the elements of each sample (B,), which has several."""
    flat = _wide(x).flatten(1)
    ratio = flat.std(1, correction=0).clamp_min(1e-6) / std
    return ((flat.mean(1) - mean).square() / std**2 + ratio.square() - 1) / 2 - ratio.log()


def non_saturating(fake: Tensor) -> Tensor:
    """Generator's loss softplus(-D(fake)), shaped like the logits (Goodfellow et al. 2014)."""
    return F.softplus(-fake)


def logistic(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator's loss softplus(-D(real)) + softplus(D(fake))."""
    return F.softplus(-real) + F.softplus(fake)


@dataclass(frozen=True)
class Contest:
    """Two losses shaped like the logits (real, fake): what the judge minimises and what the student does; pairs: whether the
    student's reads the real logits too."""

    judge: Callable[[Tensor, Tensor], Tensor]
    student: Callable[[Tensor, Tensor], Tensor]
    pairs: bool = False


CONTESTS = {
    "non_saturating": Contest(logistic, lambda real, fake: non_saturating(fake)),
    "hinge": Contest(lambda real, fake: F.relu(1 - real) + F.relu(1 + fake), lambda real, fake: -fake),  # arXiv 1705.02894
    "hinge_both": Contest(  # the student stops, too, where it is 1 beyond the border (PCM, arXiv 2405.18407)
        lambda real, fake: F.relu(1 - real) + F.relu(1 + fake), lambda real, fake: F.relu(1 - fake)
    ),
    "least_squares": Contest(lambda real, fake: (real - 1) ** 2 + fake**2, lambda real, fake: (fake - 1) ** 2),  # 1611.04076
    "relativistic": Contest(  # arXiv 1807.00734
        lambda real, fake: F.softplus(fake - real), lambda real, fake: F.softplus(real - fake), pairs=True
    ),
}


def gradient_penalty(logits: Tensor, x: Tensor) -> Tensor:
    """R1 (of real x; of fake x: R2): |grad_x D|^2 (B,) of the mean logit D, summed over x (B, C, *S), which needs a gradient.

    Mescheder et al. 2018, eq. 9, without its gamma / 2. It is differentiated twice: attention must run in plain mathematics."""
    (grad,) = torch.autograd.grad(flat_mean(logits).sum(), x, create_graph=True)
    return _wide(grad).flatten(1).square().sum(1)


def jitter_penalty(logits: Tensor, jittered: Tensor, std: float) -> Tensor:
    """R1 or R2 without a second derivative: E[((D(x + std n) - D(x)) / std)^2] (B,), mean over the logits, n ~ N(0, I).

    Both logits must be of the SAME x, noise and time: against another x it would measure how samples differ. As std -> 0
    it tends to the mean over the logits of |grad_x D_k|^2 (Seaweed-APT, arXiv 2501.08316, section 3.3, without its std^2);
    `gradient_penalty` has the slope of their mean, K times less where each of K logits looks at a place of its own."""
    return flat_mean((_wide(jittered) - _wide(logits)).square()) / std**2


def health(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """How heads do, from logits (B, K): mean distance of real from fake logits (near 0 they know nothing, above 5 the student is
    outplayed), its spread over the batch, the share judged rightly, and the share beyond +-10, where ratios are cut."""
    real, fake = real.detach(), fake.detach()
    gap, both = flat_mean(real) - flat_mean(fake), torch.cat([real, -fake])
    return {
        "gap": gap.mean(),
        "gap_std": gap.std(correction=0),
        "accuracy": (both > 0).float().mean(),
        "clipped": (both.abs() > 10).float().mean(),
    }


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
