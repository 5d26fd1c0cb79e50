"""Every test runs offline, on one thread, from the same seed."""

import os

# Before torch and the Hugging Face libraries are imported, and for every process that a test starts.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on two busy cores a second thread mostly waits at barriers

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name of a family: the folder of its tiny random pipeline."""
    from tiny import MAKERS, Made, save

    root = tmp_path_factory.mktemp("teachers")
    return Made(lambda name: save(MAKERS[name][0](), root / name))


@pytest.fixture(scope="module")
def teachers(folders):
    """name of a family: the teacher of that folder."""
    from tiny import MAKERS, Made

    from fewstep.adapters import load_teacher

    return Made(lambda name: load_teacher(str(folders[name]), size=MAKERS[name][1]))
