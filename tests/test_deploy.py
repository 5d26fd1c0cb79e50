"""The scheduler of an export gives the trained grid through the stock call, in 1, 2 and 4 steps: closed forms, every family."""

import math

import diffusers
import pytest
import torch
from tiny import MAKERS

from fewstep.deploy import seen_times
from fewstep.schedules import RectifiedFlow

DYNAMIC = ("flux", "qwen", "ltx")  # their shift is exp(mu), mu a line in the number of tokens through two points of the config


def shift(name: str, teacher, config) -> float:
    """s of t = s u / (1 + (s - 1) u), from the teacher's own scheduler."""
    if not config.get("use_dynamic_shifting"):
        return config.get("shift") or config["flow_shift"]
    if name not in DYNAMIC:
        pytest.skip("a shift with a rule of its own: tests/test_adapters.py compares it with the pipeline")
    tokens = teacher.family.pack(torch.zeros(1, *teacher.latent_shape)).shape[1]
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return math.exp(config["base_shift"] + slope * (tokens - config["base_image_seq_len"]))


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", MAKERS)
def test_the_saved_scheduler_visits_the_trained_times(teachers, name, steps, tmp_path):
    """Discrete levels: 999; 999, 499; 999, 749, 499, 249. Flow: 1, ..., 1/n under the teacher's shift, and none is wasted."""
    teacher = teachers[name]
    kind = getattr(diffusers, teacher.family.deployed or type(teacher.pipe).__name__)
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    if isinstance(teacher.schedule, RectifiedFlow):
        s = shift(name, teacher, teacher.pipe.scheduler.config)
        wanted = teacher.schedule.model_time(s * even / (1 + (s - 1) * even))
    else:
        wanted = 1000 * even - 1
    for sampler in teacher.family.samplers:
        teacher.scheduler(sampler).save_pretrained(tmp_path / sampler)
        saved = type(teacher.scheduler(sampler)).from_pretrained(tmp_path / sampler)
        seen = seen_times(
            kind, teacher.family, teacher.net, getattr(teacher.pipe, "vae", None), saved, steps, teacher.setting, sampler
        )
        assert seen == pytest.approx(wanted.tolist(), rel=1e-5, abs=1e-5)
        assert teacher.schedule.model_time(torch.tensor(teacher.grid(steps, sampler))).tolist() == pytest.approx(seen, rel=1e-6)
