"""What a teacher is told (captions, classes, a size), and what is no teacher."""

import json
import shutil

import diffusers
import pytest
import torch
from tiny import MAKERS

from fewstep.adapters import load_teacher
from fewstep.denoiser import Cond
from fewstep.families import FAMILIES


def test_conditions_do_not_depend_on_their_batch(teachers):
    for name in MAKERS.keys() - {"dit", "ddpm"}:
        teacher = teachers[name]
        words = ["a red circle", "a small blue square left of a star"]
        whole, parts = teacher.encode(words), teacher.encode(words, batch=1)
        for key, value in whole.tensors.items():
            torch.testing.assert_close(parts.tensors[key], value, rtol=1e-5, atol=1e-5)


def test_labels_reach_a_class_conditional_network():
    net = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=10,
    )
    x, time = torch.randn(2, 3, 8, 8), torch.full((2,), 500.0)
    call, encode = FAMILIES["DDPMPipeline"].call, FAMILIES["DDPMPipeline"].encode
    with torch.no_grad():
        found = call(net, x, time, encode(None, ["7", "3"], None))
        torch.testing.assert_close(found, net(x, time, class_labels=torch.tensor([7, 3])).sample)
        assert not torch.equal(found, call(net, x, time, Cond({"label": torch.tensor([3, 3])})))


def test_a_class_is_a_number_or_a_name_and_nothing_is_no_class(teachers):
    teacher = teachers["dit"]
    assert teacher.encode(["207", "otter", "", "0"]).tensors["label"].tolist() == [207, 360, 1000, 0]
    assert teacher.null().tensors["label"].tolist() == [1000]
    for wrong in ("a red circle", "1001", "-1"):
        with pytest.raises(ValueError, match=f"'{wrong}' is no class of this teacher; write classes as numbers from 0 to 999"):
            teacher.encode([wrong])


def test_a_size_that_the_pipelines_call_does_not_take_is_refused(folders):
    for name, own in (("dit", 64), ("ddpm", 8)):
        assert load_teacher(str(folders[name]), size=(own, own)).resolution == (own, own)
        with pytest.raises(ValueError, match=rf"at its own size alone, \[{own}, {own}\], not \[32, 32\]"):
            load_teacher(str(folders[name]), size=(32, 32))


# What cannot be loaded is refused in one sentence, before a weight is read where that is possible.


@pytest.fixture
def copied(folders, tmp_path):
    return lambda name="sd": shutil.copytree(folders[name], tmp_path / "copy")


def refused(path):
    with pytest.raises(ValueError) as error:
        load_teacher(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unknown_family_is_refused_before_its_weights_are_read(copied):
    folder = copied()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    shutil.rmtree(folder / "unet")
    said = refused(folder)
    assert "KandinskyPipeline is not a family fewstep knows" in said and "StableDiffusionPipeline" in said


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert "there is no teacher at" in refused(tmp_path / "nowhere")


def test_a_hub_id_without_network_is_refused():
    said = refused("models/nowhere")
    assert "the teacher models/nowhere cannot be loaded" in said and "or give a folder" in said


def test_a_folder_without_an_index_is_refused(tmp_path):
    assert "is not a Diffusers pipeline folder: it has no model_index.json" in refused(tmp_path)
    (tmp_path / "model.ckpt").touch()
    assert "is not a Diffusers pipeline folder" in refused(tmp_path / "model.ckpt")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl", ".ckpt", ".pth"])
def test_a_pickle_is_refused_unread(copied, suffix):
    folder = copied("ddpm")
    (folder / "unet" / f"diffusion_pytorch_model{suffix}").write_bytes(b"not looked at")
    said = refused(folder)
    assert f"diffusion_pytorch_model{suffix} is a pickle" in said and "save_pretrained" in said


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_index_is_refused(copied, text):
    folder = copied("ddpm")
    (folder / "model_index.json").write_text(text)
    assert "model_index.json is damaged; save the pipeline again" in refused(folder)


@pytest.mark.parametrize("left", [None, 100, 4000])
def test_missing_or_truncated_weights_are_refused(copied, left):
    folder = copied("ddpm")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.unlink()
    if left is not None:
        file.write_bytes(whole[:left])
    assert "cannot be loaded" in refused(folder)
