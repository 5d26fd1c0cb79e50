"""Students smaller than their teacher: built from its config, trained, exported as full pipelines that stock Diffusers runs."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from tiny import save, tiny_sd_pipeline, tiny_zimage_pipeline

from fewstep import api
from fewstep.adapters import load_teacher
from fewstep.config import load, parse
from fewstep.export import export
from fewstep.networks import Full, build
from fewstep.plan import plan
from fewstep.slim import body, try_out
from fewstep.verify import verify

ROOT = Path(__file__).parents[1]
HALVED = {"block_out_channels": [4, 8]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tiny_sd_pipeline(), tmp_path_factory.mktemp("teacher") / "sd")


def size(net):
    return sum(p.numel() for p in net.parameters())


def test_a_body_depends_on_its_config_and_seed_alone():
    net = tiny_sd_pipeline().unet
    before, wider = torch.get_rng_state(), {"block_out_channels": [2 * n for n in net.config["block_out_channels"]]}
    first, again, other = body(net, wider, 0), body(net, wider, 0), body(net, wider, 1)
    assert torch.equal(before, torch.get_rng_state())
    weights = [dict(made.named_parameters()) for made in (first, again, other)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert any(not torch.equal(weights[0][k], weights[2][k]) for k in weights[0])
    first = body(net, HALVED, 0)
    assert size(first) <= size(net) / 2 and not first.training and first.config["block_out_channels"] == [4, 8]
    whole = body(net, {}, 0)
    assert whole is not net and all(torch.equal(a, b) for a, b in zip(whole.parameters(), net.parameters(), strict=True))


def test_a_body_starts_from_evenly_spaced_entries_of_its_teachers_weights_and_from_all_of_those_that_fit():
    net = tiny_sd_pipeline().unet
    small, whole = body(net, HALVED, 0).state_dict(), net.state_dict()
    widths = net.config["block_out_channels"]
    first = [round(k * (widths[0] - 1) / 3) for k in range(4)]
    assert torch.equal(small["conv_in.weight"], whole["conv_in.weight"][first])
    assert torch.equal(small["conv_out.weight"], whole["conv_out.weight"][:, first])
    shallow = body(net, {"mid_block_type": None}, 0).state_dict()
    assert shallow.keys() < whole.keys() and all(torch.equal(weight, whole[k]) for k, weight in shallow.items())
    wide = body(net, {"block_out_channels": [2 * n for n in widths]}, 0).state_dict()
    assert not torch.equal(wide["conv_in.weight"][: widths[0]], whole["conv_in.weight"])
    assert torch.equal(wide["conv_out.bias"], whole["conv_out.bias"])


def test_the_average_starts_as_the_student_and_the_critic_keeps_the_teachers_shape():
    net = tiny_sd_pipeline().unet
    small = Full(network=HALVED)
    roles = build(copy.deepcopy(net), {"student": small, "average": small, "critic": Full()}, lora_targets=())
    student, average = roles["student"].weights(), roles["average"].weights()
    assert all(torch.equal(student[k], average[k]) and student[k].requires_grad for k in student)
    assert size(roles["critic"].net) == size(roles["teacher"].net) == size(net) >= 2 * size(roles["student"].net)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"block_out_chanels": [4, 8]}, "has no setting 'block_out_chanels'; did you mean block_out_channels?"),
        ({"block_out_channels": [3, 5]}, "no UNet2DConditionModel can be made with"),
        ({"_class_name": "UNet2DModel"}, "has no setting '_class_name'"),
    ],
)
def test_a_body_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        body(tiny_sd_pipeline().unet, changes, 0)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"in_channels": 5}, "does not take what its teacher takes"),
        ({"cross_attention_dim": 24}, "does not take what its teacher takes"),
        ({"out_channels": 3}, "student.network: the student"),
    ],
)
def test_a_student_that_does_not_fit_its_teacher_is_refused(folder, changes, said):
    teacher = load_teacher(str(folder))
    student = teacher.denoiser(body(teacher.net, changes, 0))
    with pytest.raises(ValueError, match=said):
        try_out(student, teacher.latent_shape, teacher.null())
    try_out(teacher.denoiser(body(teacher.net, HALVED, 0)), teacher.latent_shape, teacher.null())


def tree(folder, student, *stages):
    return {
        "teacher": {"path": str(folder)},
        "student": student,
        "objective": {"name": "regression", "steps": 1},
        "data": {"prompts": "zoo:sprites", "pairs": 6, "pairs_steps": 2},
        "train": {"rounds": 3, "batch": 2, "warmup": 0, "preview_every": 1000},
        **({"stages": list(stages)} if stages else {}),
    }


def test_what_a_config_may_not_say_of_a_network(folder):
    with pytest.raises(ValueError, match="which a LoRA cannot be: set student.weights: full"):
        parse(tree(folder, {"network": HALVED}))
    own = {"weights": "full", "network": HALVED}
    with pytest.raises(ValueError, match="the stages of a run share one network"):
        parse(tree(folder, {"weights": "full"}, {}, {"student": own}))


def test_slimflow_from_a_config_to_a_proved_export_of_half_the_parameters(folder, tmp_path):
    """Two stages, the second taught by the first's student; the export holds the smaller network."""
    file = tmp_path / "slim.yaml"
    annealed = {"objective": {"name": "annealed_reflow", "steps": 1, "anneal": 2}}
    guided = {"objective": {"name": "flow_guided", "steps": 1}, "teacher": "previous"}
    file.write_text(json.dumps(tree(folder, {"weights": "full", "network": HALVED}, annealed, guided)))
    config = load(file)
    run = api.train(config, tmp_path / "run")
    whole = size(tiny_sd_pipeline().unet)
    assert plan(config)["trained parameters"]["student"] == sum(w.numel() for w in run.weights.values()) <= whole / 2
    first, last = (torch.cat([w.flatten() for w in api.Run(tmp_path / "run" / f"stage-{k}").weights.values()]) for k in (1, 2))
    assert first.shape == last.shape and not torch.equal(first, last) and (first - last).abs().max() < 0.1
    report = verify(run.export(tmp_path / "out"))
    assert report.ok, report
    stored = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    assert stored["block_out_channels"] == [4, 8]


@pytest.mark.parametrize("teacher", ["sd", "flow"])
def test_the_shipped_students_have_at_most_half_their_teachers_parameters(teacher):
    found = plan(load(ROOT / "configs" / f"sprites-{teacher}-slimflow-1step-full.yaml"))
    assert 2 * found["trained parameters"]["student"] <= 1e6 * float(re.search(r"([\d.]+) M parameters", found["teacher"])[1])


def test_a_smaller_transformer_is_exported_too(tmp_path):
    teacher = load_teacher(str(save(tiny_zimage_pipeline(), tmp_path / "zimage")))
    kind = Full(network={"dim": 8, "n_heads": 1, "n_kv_heads": 1})
    student = build(copy.deepcopy(teacher.net), {"student": kind}, lora_targets=())["student"]
    assert size(student.net) < size(teacher.net)
    export(teacher, kind, student.weights(), sampler="ddim", steps=2, to=tmp_path / "out", record={})
    assert verify(tmp_path / "out").ok


def test_a_network_without_one_of_its_blocks_is_exported_too(folder, tmp_path):
    teacher, kind = load_teacher(str(folder)), Full(network={"mid_block_type": None})
    student = build(copy.deepcopy(teacher.net), {"student": kind}, lora_targets=())["student"]
    assert student.net.mid_block is None
    export(teacher, kind, student.weights(), sampler="ddim", steps=2, to=tmp_path / "out", record={})
    assert verify(tmp_path / "out").ok
