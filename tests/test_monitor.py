"""What a run says of itself: strict JSON, numbers that mean what they say, and advice when one leaves its band."""

import json
import math

import numpy as np
import pytest
import torch
from toys import NOTHING, SCHEDULES, Gaussian, denoiser

from fewstep.advice import BANDS, Adviser
from fewstep.monitor import Log, compare, describe

HEALTHY = {
    "round": 1,
    "student/grad_norm": 1.0,
    "student/skipped": 0.0,
    "student/x0_std": 1.0,
    "student/x0_max": 4.0,
    "student/x0_mean_0": 0.1,
    "critic/denoise": 0.2,
    "critic/denoise_linear": 0.5,
    "critic/gap": 1.5,
    "pictures/contrast": 1.0,
    "pictures/saturation": 1.0,
    "pictures/clipped": 0.0,
    "pictures/shift": 0.01,
}

# A run in trouble: the metric that the advice is about, and what the records say from the sixth on.
TROUBLE = [
    ("student/skipped", {"student/skipped": 1.0}),
    ("student/grad_norm", {"student/grad_norm": 0.0}),
    ("student/grad_rise", {"student/grad_norm": 100.0}),
    ("critic/over_linear", {"critic/denoise": 0.6}),
    ("critic/gap", {"critic/gap": 0.001}),
    ("critic/gap", {"critic/gap": 7.0}),
    ("student/x0_std", {"student/x0_std": 0.01}),
    ("student/x0_std", {"student/x0_std": 4.0}),
    ("student/x0_max", {"student/x0_max": 50.0}),
    ("student/x0_drift", {"student/x0_mean_0": 1.5}),
    ("pictures/contrast", {"pictures/contrast": 0.3}),
    ("pictures/contrast", {"pictures/contrast": 2.0}),
    ("pictures/saturation", {"pictures/saturation": 0.3}),
    ("pictures/saturation", {"pictures/saturation": 2.0}),
    ("pictures/clipped", {"pictures/clipped": 0.4}),
    ("pictures/shift", {"pictures/shift": 0.3}),
]
DRIFT = {"student/x0_mean_0": 1.5}


def run(change, rounds=12, start=6):
    """The records of a run that is healthy at first."""
    return [{**HEALTHY, "round": i, **(change if i >= start else {})} for i in range(1, rounds + 1)]


def advice(records, adviser=None):
    adviser = adviser or Adviser()
    return [one for record in records for one in adviser.read(record)[1]]


def test_a_healthy_run_gets_no_advice():
    assert advice(run({})) == []


@pytest.mark.parametrize(("metric", "change"), TROUBLE)
def test_each_number_that_leaves_its_band_gets_one_line_of_advice_once(metric, change):
    (found,) = advice(run(change))
    assert found.metric == metric and found.round >= 6
    assert str(found).startswith(f"round {found.round}: {metric} is ") and "\n" not in str(found) and ";" in found.text


def test_every_side_of_every_band_is_in_trouble_somewhere():
    assert {one.text for _, change in TROUBLE for one in advice(run(change))} == {band.advice for band in BANDS}


def test_a_band_with_patience_forgives_a_single_record():
    records = run({})
    records[6] = {**records[6], "student/x0_std": 0.01}
    assert advice(records) == []


def test_what_is_not_finite_is_null_and_gets_advice():
    record, (found,) = Adviser().read({"round": 3, "student/dm": math.nan})
    assert record == {"round": 3, "student/dm": None}
    assert "is not a finite number: it overflowed" in str(found)


def test_going_on_repeats_no_advice_and_forgets_no_history():
    records = run(DRIFT)
    before, after = records[:9], records[9:]
    assert len(advice(before)) == 1 and advice(after, Adviser(before)) == []
    early = records[:5]
    assert advice(records[5:], Adviser(early)) == advice(records)


def test_metrics_are_strict_json_whatever_they_are(tmp_path):
    log = Log(tmp_path, active=True)
    for value in (math.nan, math.inf, -math.inf, 1.5):
        record, said = Adviser().read({"round": 1, "student/dm": value})
        log.write(record, said)
        log.write({"round": 2, "student/dm": value})
    refuse = lambda name: pytest.fail(f"{name} is no JSON")  # noqa: E731
    for file in ("metrics.jsonl", "advice.jsonl"):
        lines = [json.loads(x, parse_constant=refuse) for x in (tmp_path / file).read_text().splitlines()]
        assert lines
    found = [json.loads(x)["student/dm"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [None] * 6 + [1.5] * 2


def test_latents_are_described_by_spread_reach_and_mean_of_each_channel():
    x = torch.tensor([[[[1.0, 3.0]], [[-9.0, -9.0]]]])  # (1, 2, 1, 2)
    found = {k: v.item() for k, v in describe(x).items()}
    assert found == {"x0_std": pytest.approx(x.std().item()), "x0_max": 9.0, "x0_mean_0": 2.0, "x0_mean_1": -9.0}


def pictures(seed=0):
    return np.random.default_rng(seed).integers(60, 180, (4, 16, 16, 3), dtype=np.uint8)


def test_a_student_that_draws_like_its_teacher_has_ratios_of_one():
    assert compare(pictures(), pictures()) == pytest.approx(
        {"pictures/contrast": 1.0, "pictures/saturation": 1.0, "pictures/clipped": 0.0, "pictures/shift": 0.0}, abs=1e-6
    )


def test_contrast_saturation_clipping_and_tint_are_told_apart():
    x = pictures().astype(np.float64)
    grey = x.mean(-1, keepdims=True)
    pale = compare((x / 2 + 60).round().astype(np.uint8), pictures())
    assert pale["pictures/contrast"] == pytest.approx(0.5, abs=0.02)
    dull = compare((grey + (x - grey) / 4).round().astype(np.uint8), pictures())
    assert dull["pictures/saturation"] < 0.4
    bleak = compare(grey.repeat(3, -1).round().astype(np.uint8), pictures())
    assert bleak["pictures/saturation"] < 0.05
    harsh = compare(np.clip(120 + 6 * (x - 120), 0, 255).astype(np.uint8), pictures())
    assert harsh["pictures/clipped"] > 0.5 and harsh["pictures/contrast"] > 1.5
    tinted = compare((x + [51, 0, 0]).astype(np.uint8), pictures())
    assert tinted["pictures/shift"] == pytest.approx(0.2, abs=1e-4)


@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "flow", "sample"])
def test_the_linear_loss_is_what_the_best_denoiser_of_a_normal_law_is_left_with(target):
    """T4: measured on its own samples, the exact denoiser's loss; a worse one's is above it."""
    torch.manual_seed(0)
    schedule, n = SCHEDULES["flow" if target == "flow" else "sd"], 200_000
    mean, std = torch.tensor([0.3, -1.0], dtype=torch.float64), torch.tensor([0.5, 1.4], dtype=torch.float64)
    x0, eps = mean + std * torch.randn(n, 2, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64)
    t = torch.full((n,), 0.4, dtype=torch.float64)
    losses = []
    for law in (std.square(), 2 * std.square()):
        critic = denoiser(Gaussian(mean.tolist(), law.tolist()), schedule, target)
        with torch.no_grad():
            prediction = critic(schedule.add_noise(x0, eps, t), t, NOTHING)
        losses.append((critic.native(prediction, t) - critic.aim(x0, eps, t)).square().mean().item())
    floor = critic.linear_loss(x0, t).mean().item()
    assert losses[0] == pytest.approx(floor, rel=0.01) and losses[1] > 1.02 * floor
