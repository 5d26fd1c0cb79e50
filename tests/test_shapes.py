"""Pictures of several shapes: which sizes there are, and for whom."""

import json

import pytest

from fewstep.config import parse
from fewstep.families import FAMILIES
from fewstep.shapes import sizes_of, step_of

VAE = {"block_out_channels": [128, 256, 512, 512]}
SD = {"in_channels": 4, "down_block_types": (), "block_out_channels": [320, 640, 1280, 1280]}
SDXL = {"in_channels": 4, "down_block_types": (), "block_out_channels": [320, 640, 1280]}
FLUX = {"in_channels": 64, "patch_size": 1}


def sizes(pipeline, net, size, aspect):
    return sizes_of(FAMILIES[pipeline], net, VAE, size, aspect)


def test_sdxl_gets_the_sizes_it_was_trained_at():
    found = sizes("StableDiffusionXLPipeline", SDXL, (1024, 1024), 2.0)
    assert found[0] == (1024, 1024)
    assert set(found) == {
        *((1024, 1024), (768, 1344), (832, 1216), (896, 1152), (960, 1088)),
        *((1344, 768), (1216, 832), (1152, 896), (1088, 960)),
    }
    wide = sizes("StableDiffusionXLPipeline", SDXL, (1024, 1024), 4.0)
    assert {(512, 2048), (576, 1792), (640, 1600), (704, 1472)} <= set(wide)


@pytest.mark.parametrize(
    ("pipeline", "net", "size", "step"),
    [
        ("StableDiffusionPipeline", SD, (512, 512), 64),  # its UNet halves 8 pixels' latents three times
        ("StableDiffusionPipeline", SD, (768, 768), 64),
        ("StableDiffusionXLPipeline", SDXL, (512, 512), 32),
        ("FluxPipeline", FLUX, (1024, 1024), 64),
        ("FluxPipeline", FLUX, (64, 64), 16),  # latents are packed by twos
        ("FluxPipeline", FLUX, (768, 1344), 64),
    ],
)
def test_sides_are_multiples_and_areas_within_a_step(pipeline, net, size, step):
    assert step_of(FAMILIES[pipeline], net, VAE, size) == step
    area = size[0] * size[1]
    found = sizes(pipeline, net, size, 3.0)
    assert len(set(found)) == len(found) > 2
    for height, width in found[1:]:
        assert height % step == width % step == 0
        assert max(height, width) <= 3 * min(height, width)
        assert area - step * min(height, width) < height * width <= area
        assert (width, height) in found


def test_an_aspect_of_one_is_the_teachers_own_size_and_videos_keep_their_frames():
    assert sizes("StableDiffusionPipeline", SD, (520, 512), 1.0) == ((520, 512),)
    wan = {"scale_factor_spatial": 8, "scale_factor_temporal": 4}
    found = sizes_of(FAMILIES["WanPipeline"], {"in_channels": 16, "patch_size": [1, 2, 2]}, wan, (81, 480, 832), 2.0)
    assert found[0] == (81, 480, 832) and len(found) > 3
    assert all(size[0] == 81 and size[1] % 16 == size[2] % 16 == 0 for size in found)


def test_a_teacher_of_one_size_is_refused_where_the_config_is_read(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    tree = {"teacher": {"path": str(tmp_path)}, "objective": {"name": "dmd"}, "data": {"prompts": "zoo:sprites", "aspect": 2}}
    with pytest.raises(ValueError, match="data.aspect: this teacher draws at one size alone; leave it away"):
        parse(tree)
    assert parse({**tree, "data": {"prompts": "zoo:sprites", "aspect": 1}}).data.aspect == 1
    assert parse({**tree, "teacher": {"path": "owner/model"}}).data.aspect == 2  # not known before it is loaded
    with pytest.raises(ValueError, match="draws at one size alone"):
        sizes("DiTPipeline", {"in_channels": 4}, (256, 256), 2.0)
    with pytest.raises(ValueError, match="data.aspect: .*greater than or equal to 1"):
        parse({**tree, "data": {"prompts": "zoo:sprites", "aspect": 0.5}})
