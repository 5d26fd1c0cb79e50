"""Several processes of one run: what they find together is what one would find alone."""

from dataclasses import replace

import pytest
import torch
from every import EVERY, made
from torch import Tensor
from toys import (
    Joined,
    ring,
    side_by_side,
)

from fewstep.objectives.adversarial import Adversarial
from fewstep.objectives.uni_instruct import UniInstruct
from fewstep.stream import stream


@pytest.mark.parametrize("name", [*EVERY, "uni_instruct-kl"])
def test_two_processes_are_one_on_the_joined_batch(name):
    """T28: what they average is the gradient of one process that holds the samples of both, in every turn. Nothing of a batch
    may be drawn or averaged a process apart."""
    objective = made(name) if name in EVERY else Adversarial(inner=UniInstruct(steps=2, divergence="kl"))
    world, n = ring(objective, torch.float64), 16
    for net in world.players.values():
        for weight in net.double().parameters():  # heads too; away from the start, where last layers are zero
            weight.data += 0.2 * torch.randn_like(weight)

    def found(turn, batch, key, *ranks, everywhere=Tensor.detach):
        """The movers' gradients in one vector."""
        rng = Joined(tuple(stream(0, rank, *key) for rank in ranks), n)
        weights = [p for mover in turn.movers for p in world.players[mover].parameters()]
        grads = torch.autograd.grad(
            turn.loss(replace(world.nets, everywhere=everywhere), batch, rng).total,
            weights,
            materialize_grads=True,
            allow_unused=True,
        )
        return torch.cat([g.flatten() for g in grads])

    for round_ in sorted({0, objective.needs.rounds - 1}):  # the last phase, where there are several
        for i, turn in enumerate(objective.round(round_)):
            for player, net in world.players.items():
                net.requires_grad_(player in turn.movers)
            whole = world.batch(2 * n)
            latents, noise = (None if x is None else x.double() for x in (whole.latents, whole.noise))
            halves = [
                replace(whole, shape=(n, 2), latents=latents[part], noise=None if noise is None else noise[part])
                for part in (slice(n), slice(n, None))
            ]
            one = found(turn, replace(whole, latents=latents, noise=noise), (round_, i), 0, 1)
            two = side_by_side(lambda rank, mean: found(turn, halves[rank], (round_, i), rank, everywhere=mean))  # noqa: B023
            assert one.abs().max() > 0
            torch.testing.assert_close(sum(two) / 2, one, rtol=1e-8, atol=1e-8 * one.abs().max().item())
