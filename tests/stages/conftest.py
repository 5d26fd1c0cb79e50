"""Runs of several stages on a tiny teacher."""

import pytest

from fewstep import api


@pytest.fixture(scope="module")
def teacher(folders):
    return str(folders["sd"])


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory):
    """Encodings are kept for all tests, and no pictures are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(api.Preview, "__call__", lambda *_: None)
        yield
