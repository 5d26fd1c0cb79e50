"""Runs of several stages on a tiny teacher."""

import numpy as np
import pytest
from PIL import Image

from fewstep.preview import Preview


@pytest.fixture(scope="module")
def teacher(folders):
    return str(folders["sd"])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory):
    """Encodings are kept for all tests, and no pictures are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(Preview, "__call__", lambda *_: None)
        yield
