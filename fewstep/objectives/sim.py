"""Score implicit matching (SIM, Luo et al. 2024, arXiv 2410.16794)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from fewstep.losses import flat_mean
from fewstep.objectives.base import Batch, Losses, Nets, register
from fewstep.objectives.two_time_scale import TwoTimeScale, size
from fewstep.stream import Stream


@register("sim")
@final
@dataclass(frozen=True, kw_only=True)
class SIM(TwoTimeScale):
    """The student lowers a distance of two scores that grows like their difference, not like its square, by a gradient that
    passes through the inputs of both networks: a sample weighs no more for being far off. Prompts only.

    steps: of the deployed student; a round trains one of them, chosen evenly, as in `sid`. huber: c of the pseudo-Huber distance
    sqrt(|delta|^2 + c^2) - c of x0 predictions, in units of their root mean square over a sample, so that it means the same at
    every resolution; as it grows, the loss becomes that of `sid` with alpha = 1 and no normaliser, over c.
    The other settings are those of TwoTimeScale.
    Deviations: the paper's c, weights of noise levels and ratio of turns could not be checked; here each level weighs as its
    difference of x0 predictions does. A few steps are as in few-step SiD (arXiv 2505.12674); SIM is a one-step method.
    """

    steps: int = 4
    sampler: str | None = None
    huber: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.huber <= 0:
            raise ValueError(f"huber must be positive, not {self.huber}: at 0 the distance has no gradient where the scores meet")

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """delta (f_fake - x) / sqrt(|delta|^2 + c^2) with delta = f_real - f_fake, the root differentiated too."""
        assert nets.critic is not None
        x, x_t, t = self.noised(nets, batch, rng)
        fake = nets.critic(x_t, t, batch.cond).x0
        delta = nets.teacher(x_t, t, batch.cond).x0 - fake
        loss = flat_mean(delta * (fake - x)) / (flat_mean(delta.square()) + self.huber**2).sqrt()
        return Losses({"sim": loss}, {"delta": size(delta)}, x)
