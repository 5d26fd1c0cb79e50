"""A random open_clip model of some 0.1 s, written as a folder of the 'local-dir:' schema, and pictures to feed it."""

import functools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fewstep.zoo import sprites

SIDE, CONTEXT = 32, 12


def write_clip(folder, seed=0):
    from open_clip import CLIP

    config = {
        "model_cfg": {
            "embed_dim": 8,
            "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
            "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.3] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(**config["model_cfg"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "tiny-clip")


@pytest.fixture
def make_clip():
    return write_clip


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (24, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture
def zoo_clip(monkeypatch, clip_folder):
    """The random model in the place of zoo:sprites-clip, which may not be built yet."""
    import fewstep.zoo
    from fewstep.evaluation import protocol, reference

    monkeypatch.setattr(fewstep.zoo, "folder", lambda name: clip_folder)
    caches = (protocol._extractor, protocol._clip, reference.load_reference)
    for cache in caches:
        cache.cache_clear()
    yield clip_folder
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def quick_reader(monkeypatch):
    """The reader of attributes, calibrated on a tenth of its drawings: seconds less."""
    from fewstep.zoo import reading

    monkeypatch.setattr(reading, "_yardstick", functools.lru_cache(reading._yardstick.__wrapped__))
    monkeypatch.setattr(reading, "scenes", lambda seed, n: sprites.scenes(seed, n // 10))
