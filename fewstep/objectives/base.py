"""What an objective is: a game whose rounds are turns, each one optimizer update of one player."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from itertools import pairwise
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fewstep.denoiser import Cond, Denoiser, Guided, Prediction
from fewstep.heads import Heads, Point
from fewstep.losses import mse
from fewstep.sampling import Step, advance, uniform_grid
from fewstep.stream import Stream
from fewstep.times import Uniform


@dataclass(frozen=True)
class Batch:
    """What one turn learns from: conditions (B), the shape (B, C, *S) of what is denoised, clean data where it is used, and,
    where that is the teacher's own samples, the noise each of them came from."""

    cond: Cond
    shape: tuple[int, ...]
    latents: Tensor | None = None
    noise: Tensor | None = None


class Judge(Protocol):
    """Discriminator heads on the features of a denoiser (the critic's or the teacher's)."""

    def logits(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Logits (B, K) of "x_t is noised real data", float32; the network runs no further than its last tapped block."""

    def both(self, x_t: Tensor, t: Tensor, cond: Cond, *, graph: bool = True) -> tuple[Prediction, Tensor]:
        """The denoiser's own prediction and the logits, from one pass. graph: whether the prediction has one; without, nothing is
        kept of what lies beyond the tapped blocks."""

    def beside(self, points: Sequence[Point], origin: Point | None, cond: Cond) -> list[Tensor]:
        """Logits (B, K) of each of several points, seen beside the one they came from where heads see both; from one pass."""


@dataclass(frozen=True)
class Nets:
    """The players as denoisers, and how the student will be deployed: its times and its step. average: the student with a moving
    average of its weights, where `Needs.average` asks for one. weighting: log-weights (B,) of losses at times (B,), which the
    role of that name learns. everywhere: the mean of a tensor over all processes, which hold as many samples each; without a
    graph. finer: the times at which a student of so many steps would be deployed."""

    student: Denoiser
    teacher: Denoiser | Guided
    grid: tuple[float, ...]
    step: Step
    critic: Denoiser | None = None
    judge: Judge | None = None
    average: Denoiser | None = None
    weighting: Callable[[Tensor], Tensor] | None = None
    everywhere: Callable[[Tensor], Tensor] = Tensor.detach
    finer: Callable[[int], tuple[float, ...]] = uniform_grid

    def level(self, t: Tensor) -> Tensor:
        """The times that say how noisy the student's own inputs are at times (B,) of its grid: at the first stands pure noise,
        whatever time its network is told there (conditioning_timestep)."""
        return t.where(t != self.grid[0], 1.0)


@dataclass(frozen=True)
class Landing:
    """Where the student's jump from x_t (B, C, *S) at t (B,) landed at s (B,), with its graph, and where it should have."""

    x_t: Tensor
    t: Tensor
    x_s: Tensor
    target: Tensor
    s: Tensor


@dataclass(frozen=True)
class Losses:
    """Per-sample terms (B,) whose sum is minimised in the mean, scalars to log, and the student's sample with its graph. landing:
    of an objective that `lands`, what its terms measure the distance of."""

    terms: dict[str, Tensor]
    stats: dict[str, Tensor] = field(default_factory=dict)
    sample: Tensor | None = None
    landing: Landing | None = None

    @property
    def total(self) -> Tensor:
        return torch.stack([term.mean() for term in self.terms.values()]).sum()


@dataclass(frozen=True)
class Turn:
    """One optimizer update of one player, or of others along with it where one loss teaches them together.

    followers: roles that are drawn after the player when it has moved, each by a share of the way, 0 (not at all) to 1 (they
    become its copy). They must have weights of the same kind.
    fresh: before it, the player goes back to the weights it had before training, and its optimizer forgets.
    sample: what the loss hands on as its sample, from the same draws but without its targets; None: ask the loss itself."""

    player: str
    loss: Callable[[Nets, Batch, Stream], Losses]
    others: tuple[str, ...] = ()
    followers: Mapping[str, float] = field(default_factory=dict)
    fresh: bool = False
    sample: Callable[[Nets, Batch, Stream], Tensor] | None = None

    @property
    def movers(self) -> tuple[str, ...]:
        """Everyone who moves."""
        return (self.player, *self.others)


@dataclass(frozen=True)
class Needs:
    """What an objective cannot do without: trained roles besides the student; clean data; the noise behind it, which only the
    teacher's own samples have (`pairs`: of whoever teaches; with `originals` of the first teacher all the same); which heads,
    where "heads" is among the roles; and what the student's network takes besides (`embedders`: "guidance_scale", "end_time").
    scales: from which to which the former is; phases: how many experts the student must be, if not one network; restarts: the
    roles that some turn starts afresh; rounds: below how many of them the method would end unfinished; average: decay of a moving
    average of the student to ask for targets;
    partly: some turn asks a part of its player alone; mixes: it guides at scales of its own, by two predictions."""

    roles: tuple[str, ...] = ()
    images: bool = False
    pairs: bool = False
    originals: bool = False
    heads: Heads = field(default_factory=Heads)
    inputs: tuple[str, ...] = ()
    scales: tuple[float, float] | None = None
    phases: int = 1
    restarts: tuple[str, ...] = ()
    rounds: int = 1
    average: float | None = None
    partly: bool = False
    mixes: bool = False


class Objective(ABC):
    """A method: a final frozen dataclass whose fields are its configuration and whose methods are its mathematics.

    It owns no weights and keeps no state. Every one has the field `steps`, the number of steps its student is deployed with, and
    `sampler`, the name of the deployed step (None: the first of the teacher's family that `samplers` allows), and a default for
    every field."""

    steps: int
    sampler: str | None
    lands: ClassVar[bool] = False  # whether its student's losses say where the student landed
    __pydantic_config__: ClassVar[dict[str, bool]] = {"arbitrary_types_allowed": True}  # a field may hold an objective

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """The roles and data that this configuration of it cannot do without."""

    @property
    def samplers(self) -> tuple[str, ...] | None:
        """The deployed steps that go where its student was taught to go, if it takes several (one ends at x0 whatever the
        step). None: any, as where it learns on its own deployed walk; none at all: it draws in one step only."""
        return None

    @property
    def walks(self) -> bool:
        """Whether its student is only ever asked on its own deployed walk, so that the walk may begin with pure noise at any
        time (`student.conditioning_timestep`); others learn from noised data, whose time says how much noise there is."""
        return False

    @property
    def local(self) -> bool:
        """Whether its student knows the times of its own steps alone, and can teach only who asks it there."""
        return self.walks or self.samplers == ()

    @property
    def asks(self) -> int | None:
        """The number of deployed steps at whose times it asks its teacher; 0: never, as it learns from pairs; None: anywhere."""
        return None

    @property
    def draws(self) -> bool:
        """Whether the sample that its student's losses hand on is one that the student could draw, and no point on the way to
        one: what heads judge beside real data."""
        return True

    @property
    def audible(self) -> bool:
        """Whether its critic, if it has one, is asked under the prompts as they are, so that heads may judge by those passes;
        one that is guided is asked under none, too, or of some samples alone."""
        return True

    @abstractmethod
    def round(self, step: int) -> list[Turn]:
        """The turns of round `step`, in order."""


class Wrapper(Objective):
    """An objective around another one, the field `inner`, whose student it trains to be deployed as the inner one says."""

    inner: Objective

    @property
    def steps(self) -> int:  # type: ignore[override]
        return self.inner.steps

    @property
    def sampler(self) -> str | None:  # type: ignore[override]
        return self.inner.sampler

    @property
    def samplers(self) -> tuple[str, ...] | None:
        return self.inner.samplers

    @property
    def walks(self) -> bool:
        return self.inner.walks

    @property
    def local(self) -> bool:
        return self.inner.local

    @property
    def asks(self) -> int | None:
        return self.inner.asks


REGISTRY: dict[str, type[Objective]] = {}


def register(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Makes an objective known by name. Raises ValueError where the name is taken."""

    def keep(kind: type[Objective]) -> type[Objective]:
        if name in REGISTRY and REGISTRY[name] is not kind:
            raise ValueError(f"two objectives want the name {name!r}: {REGISTRY[name].__module__} and {kind.__module__}")
        REGISTRY[name] = kind
        return kind

    return keep


def objectives() -> dict[str, type[Objective]]:
    """Every known objective: those of this package and of installed ones with the entry point `fewstep.objectives`."""
    import fewstep.objectives  # noqa: F401  (its modules register themselves)

    for point in entry_points(group="fewstep.objectives"):
        register(point.name)(point.load())
    return dict(sorted(REGISTRY.items()))


def full(t: float, n: int) -> Tensor:
    """One time for a whole batch (n,), float64."""
    return torch.full((n,), t, dtype=torch.float64)


def simulate(nets: Nets, batch: Batch, rng: Stream, among: range | None = None) -> Prediction:
    """Backward simulation (DMD2, section 4.5): every sample walks from noise to a step of its own without a graph, and that step
    is predicted with one. Its x0 is what the deployed sampler would stand on.

    The paper's code takes one step for all. Here a batch is shared out over the steps: as many passes, by all processes alike,
    and a critic that is shown every step's output in every turn does not forget the others' meanwhile.
    among: the steps to choose from, all of them by default."""
    return simulate_steps(nets, batch, rng, among)[1]


def simulate_steps(nets: Nets, batch: Batch, rng: Stream, among: range | None = None) -> tuple[Tensor, Prediction]:
    """`simulate`, with the times (B,) of the steps that were chosen."""
    among = among or range(len(nets.grid))
    first = rng.shared.integer(len(among))
    stops = [among[(first + i) % len(among)] for i in range(batch.shape[0])]
    rows = list(nets.student.schedule.prior(rng.normal(batch.shape)))
    with torch.no_grad():
        for k, (t, s) in enumerate(pairwise(nets.grid)):
            going = [i for i, stop in enumerate(stops) if stop > k]
            if not going:
                break
            x, cond = torch.stack([rows[i] for i in going]), batch.cond.take(going)
            moved = advance(nets.student, x, t, s, cond, step=nets.step, rng=rng)[1]
            for i, row in zip(going, moved, strict=True):
                rows[i] = row
    times = torch.tensor([nets.grid[k] for k in stops], dtype=torch.float64)
    return times, nets.student(torch.stack(rows), times, batch.cond)


def denoise(
    critic: Denoiser, batch: Batch, x: Tensor, times: Uniform, rng: Stream, *, by: Denoiser | Guided | None = None
) -> Losses:
    """The loss that makes a critic know the law of x (B, C, *S): its native target at times of that law.

    by: who predicts, where that is not the critic alone but a guided combination of its two predictions."""
    t = times.sample(len(x), rng)
    eps = rng.normal_like(x)
    prediction = (by or critic)(critic.schedule.add_noise(x, eps, t), t, batch.cond)
    stats = {"denoise_linear": critic.linear_loss(x, t).mean()}  # what the monitors hold the loss against
    return Losses({"denoise": mse(critic.native(prediction, t), critic.aim(x, eps, t))}, stats, x)
