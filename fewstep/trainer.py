"""The loop: rounds of turns, one optimizer a player. Nothing here names a method; accelerate appears only here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep import checkpoint, optimizers
from fewstep.data import Buckets, Source
from fewstep.ema import Ema
from fewstep.experts import PhasedExperts
from fewstep.monitor import Monitor
from fewstep.networks import Role, follow, set_weights
from fewstep.objectives.base import Batch, Losses, Nets, Objective
from fewstep.progress import track
from fewstep.stopping import interruptible
from fewstep.stream import stream


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how fast. A round is what the objective says it is; `batch` counts samples of one process and turn."""

    rounds: int = 300
    batch: int = 32
    lr: float = 1e-4
    critic_lr: float | None = None  # None: lr
    heads_lr: float | None = None  # None: lr
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 10  # rounds of linear warm-up
    betas: tuple[float, float] = (0.9, 0.999)
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"  # the second needs bitsandbytes and CUDA
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm of a turn
    ema: float = 0.99  # decay of the student's average, which is what is previewed, exported and judged; 0: the last weights
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # math: plain products of matrices; sdpa's fused kernel is slow backward on a CPU in bfloat16
    attention: Literal["sdpa", "math", "xformers", "flash"] = "sdpa"
    checkpointing: bool = False  # gradient checkpointing: less memory, a third more time
    log_every: int = 10
    save_every: int = 100
    preview_every: int = 100
    keep: int = 2  # checkpoints, the newest; each can be drawn, judged and exported by its folder

    def __post_init__(self) -> None:
        rules: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
            ("rounds batch log_every save_every preview_every keep", lambda x: x >= 1, "at least 1"),
            ("lr critic_lr heads_lr clip", lambda x: x is None or 0 < x < math.inf, "positive and finite"),
            ("warmup weight_decay", lambda x: 0 <= x < math.inf, "at least 0 and finite"),
            ("betas", lambda x: all(0 <= beta < 1 for beta in x), "two decays in [0, 1)"),
            ("ema", lambda x: 0 <= x < 1, "a decay in [0, 1)"),
            ("seed", lambda x: 0 <= x < 2**32, "from 0 to 2**32 - 1"),
        )
        for names, fits, words in rules:
            for name in names.split():
                if not fits(value := getattr(self, name)):
                    raise ValueError(f"train.{name} must be {words}, not {value}")

    def rate(self, player: str, round_: int) -> float:
        """The learning rate of a player in a round; a pure function, so resuming needs no scheduler state."""
        own = {"critic": self.critic_lr, "heads": self.heads_lr}.get(player)
        base = self.lr if own is None else own
        ramp = min(1.0, (round_ + 1) / max(1, self.warmup))
        if player == "student" and self.schedule == "cosine":
            ramp *= 0.5 * (1 + math.cos(math.pi * round_ / self.rounds))
        return base * ramp


@dataclass(frozen=True)
class Job:
    """Everything `fit` runs: nets makes the players' denoisers from their (wrapped) modules; preview draws a picture of the
    student with the given weights and may say numbers of it to log; identity is stored with every checkpoint."""

    objective: Objective
    roles: dict[str, Role | PhasedExperts]
    nets: Callable[[Mapping[str, nn.Module]], Nets]
    source: Source | Buckets
    settings: Settings
    folder: Path
    identity: dict[str, Any] = field(default_factory=dict)
    preview: Callable[[int, Mapping[str, Tensor]], Mapping[str, float] | None] | None = None


class Diverged(ValueError):
    """Training cannot go on: updates have not been finite for many turns in a row."""


class Player:
    """A trained role with its optimizer. A non-finite gradient skips the update on every process, and is counted.

    restarts: whether it may be told to start afresh, for which its first weights are kept."""

    def __init__(self, role: Role | PhasedExperts, settings: Settings, accelerator: Accelerator, restarts: bool) -> None:
        self.role = role
        self.first = {k: p.detach().to("cpu", copy=True) for k, p in role.weights().items()} if restarts else {}
        self.keys = list(role.weights())
        self.parameters = list(role.weights().values())
        make = optimizers.KINDS[settings.optimizer].make
        optimizer = make(self.parameters, settings.lr, settings.betas, settings.weight_decay)
        self.module, self.optimizer = accelerator.prepare(role, optimizer)
        device = accelerator.device
        self.skipped, self.streak = torch.zeros((), device=device), torch.zeros((), device=device)

    def update(self, rate: float, clip: float) -> Tensor:
        """One optimizer step from the gradients at hand; returns their norm."""
        norm = nn.utils.clip_grad_norm_(self.parameters, clip)
        bad = (~torch.isfinite(norm)).float()
        inner = self.optimizer.optimizer
        for group in inner.param_groups:
            group["lr"] = rate
        optimizers.step_unless(bad, self.optimizer, inner)
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += bad
        self.streak = (self.streak + 1) * bad
        return torch.where(bad > 0, 0.0, norm)

    def restart(self) -> None:
        """Back to the weights from before training, with an optimizer that knows nothing."""
        set_weights(self.role, self.first)
        self.optimizer.optimizer.state.clear()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        state = self.optimizer.optimizer.state
        named = zip(self.keys, self.parameters, strict=True)
        return {f"{k}:{name}": torch.as_tensor(v) for k, p in named for name, v in state.get(p, {}).items()}

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        state, own = self.optimizer.optimizer.state, dict(zip(self.keys, self.parameters, strict=True))
        for name, value in tensors.items():
            key, _, part = name.rpartition(":")
            counted = value.ndim == 0 and not value.is_floating_point()  # a plain number, as some optimizers count their steps
            state[own[key]][part] = int(value) if counted else value.to(own[key].device)


def runs_on_cpu(settings: Settings) -> bool:
    """Where a run takes place. Raises ValueError where CUDA is asked for and absent, and for what does not work there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device is cuda, but this machine has no usable CUDA device; set train.device to cpu or auto")
    cpu = settings.device == "cpu" or not torch.cuda.is_available()
    optimizers.check_optimizer(settings.optimizer, cpu)
    return cpu


def make_accelerator(settings: Settings, *, partly: bool = False) -> Accelerator:
    """The process group and device of a run; partly: some turn asks only a part of its player, as of a mixture of experts.

    Raises ValueError as `runs_on_cpu` does."""
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if partly else None
    return Accelerator(cpu=runs_on_cpu(settings), step_scheduler_with_optimizer=False, kwargs_handlers=handlers)


def fit(job: Job, *, resume: bool = False, accelerator: Accelerator | None = None) -> Path:
    """Trains until `settings.rounds` and returns the last checkpoint. Ctrl-C or SIGTERM saves after the round and stops."""
    settings = job.settings
    accelerator = accelerator or make_accelerator(settings)
    device = str(accelerator.device)
    needs = job.objective.needs
    for role in job.roles.values():
        role.net.to(accelerator.device)
    players = {name: Player(job.roles[name], settings, accelerator, name in needs.restarts) for name in ("student", *needs.roles)}
    nets = job.nets({**job.roles, **{name: p.module for name, p in players.items()}})
    if accelerator.num_processes > 1:
        nets = replace(nets, everywhere=lambda x: accelerator.reduce(x.detach(), "mean"))
    averages = _averages(job)
    start = _restore(job, players, averages) if resume else 0
    _follow(job, averages)
    monitor = Monitor(job.folder, job.roles, start, active=accelerator.is_main_process)
    bar = track(range(start, settings.rounds), "train", settings.rounds, start=start)
    kernels = sdpa_kernel(SDPBackend.MATH) if settings.attention == "math" else nullcontext()
    with interruptible() as stopped, kernels:
        for round_ in bar:
            for i, turn in enumerate(job.objective.round(round_)):
                rng = stream(settings.seed, accelerator.process_index, round_, i, device)
                cond, shape, *known = job.source.draw(settings.batch, rng.child("data"))
                latents, noise = (None if x is None else x.to(device) for x in known)
                batch = Batch(cond.to(device), shape, latents, noise)
                for name, player in players.items():
                    player.role.requires_grad_(name in turn.movers)
                if turn.fresh:
                    players[turn.player].restart()
                with monitor.passes:
                    losses: Losses = turn.loss(nets, batch, rng)
                accelerator.backward(losses.total)
                norms = {name: players[name].update(settings.rate(name, round_), settings.clip) for name in turn.movers}
                monitor.turn(turn.player, losses, norms)
                for name, share in turn.followers.items():
                    follow(job.roles[name], job.roles[turn.player], share)
                if "student" in turn.movers:
                    for average in averages.values():
                        average.update(job.roles["student"].weights(), round_)
                    _follow(job, averages)
            done = round_ + 1
            stop = _agreed(stopped(), done % settings.log_every == 0, accelerator)
            last = done == settings.rounds or stop
            if done % settings.log_every == 0 or last:
                _check(players, done)
                skipped = {name: float(player.skipped) for name, player in players.items()}
                record = monitor.record(done, settings.batch, skipped, lambda x: accelerator.reduce(x, "mean"))
                bar.note = ", ".join(f"{k} {v:.3g}" for k, v in record.items() if k.endswith(("/dm", "/consistency", "/denoise")))
            if done % settings.save_every == 0 or last:
                _save(job, players, averages, done, accelerator)
            if job.preview and accelerator.is_main_process and (done % settings.preview_every == 0 or last):
                monitor.tell({"round": done, **(job.preview(done, averages["ema"].shadow) or {})})
            if stop:
                raise KeyboardInterrupt
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    found = checkpoint.latest(job.folder / "checkpoints")
    assert found is not None
    return found


def _check(players: Mapping[str, Player], done: int) -> None:
    for name, player in players.items():
        if player.streak >= 10:
            raise Diverged(
                f"the {name}'s gradient has not been finite for {int(player.streak)} updates in a row (round {done}); "
                "start a new run with a lower train.lr, or with train.dtype: float32"
            )


def _agreed(stop: bool, due: bool, accelerator: Accelerator) -> bool:
    """Whether to stop after this round. Several processes, each told at an instant of its own, ask one another when it is due."""
    if accelerator.num_processes == 1:
        return stop
    return due and bool(accelerator.reduce(torch.tensor(float(stop), device=accelerator.device)) > 0)


def _averages(job: Job) -> dict[str, Ema]:
    """Moving averages of the student by their file's name: what is deployed, and what the objective asks for targets."""
    wanted, student = {"ema": job.settings.ema}, job.roles["student"].weights()
    if job.objective.needs.average is not None:
        wanted["average"] = job.objective.needs.average
    return {name: Ema(student, decay) for name, decay in wanted.items()}


def _follow(job: Job, averages: Mapping[str, Ema]) -> None:
    """Puts the average that is asked for targets into its role."""
    if "average" in averages:
        set_weights(job.roles["average"], averages["average"].shadow)


def _save(job: Job, players: Mapping[str, Player], averages: Mapping[str, Ema], done: int, accelerator: Accelerator) -> None:
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    files: dict[str, Mapping[str, Tensor]] = {name: average.shadow for name, average in averages.items()}
    for name, player in players.items():
        files[name] = player.role.weights()
        files[f"optimizer-{name}"] = player.optimizer_tensors()
    state = {"roles": list(players), "skipped": {n: float(p.skipped) for n, p in players.items()}, **job.identity}
    checkpoint.save(job.folder / "checkpoints", done, files, state, keep=job.settings.keep)


def _restore(job: Job, players: Mapping[str, Player], averages: Mapping[str, Ema]) -> int:
    place = checkpoint.latest(job.folder / "checkpoints")
    if place is None:
        return 0
    files, state = checkpoint.load(place)
    if state["roles"] != list(players):
        raise ValueError(
            f"{place} holds the roles {state['roles']}, this config trains {list(players)}; use the config it was made with"
        )
    for name, player in players.items():
        set_weights(player.role, files[name])
        player.load_optimizer(files[f"optimizer-{name}"])
        player.skipped += state["skipped"][name]
    for name, average in averages.items():
        for key, value in files[name].items():
            average.shadow[key].copy_(value)
    return int(state["round"])
