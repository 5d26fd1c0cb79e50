"""Two processes train one model: `torchrun tests/test_parallel.py TEACHERS OUT` is what each of them runs."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny import save, tiny_sd_pipeline, tiny_zimage_pipeline

ROOT = Path(__file__).parents[1]
CASES = [
    ("sd", "lora", "dmd"),
    ("sd", "full", "dmd"),
    ("zimage", "full", "dmd"),
    ("sd", "full", "adversarial"),
    ("sd", "lora", "critic-added"),
    ("sd", "lora", "phased"),
    ("sd", "lora", "shapes-dmd"),
]
DMD = {"name": "dmd", "steps": 2, "critic_turns": 1}
OBJECTIVES = {
    "dmd": DMD,
    "shapes-dmd": DMD,
    "adversarial": {"name": "adversarial", "inner": DMD},
    "phased": {"name": "phased_dmd", "steps": 2, "critic_turns": 1, "phase_rounds": 2},
    "landing": {"name": "adversarial_distance", "inner": {"name": "progressive", "steps": 2}},
    "critic-added": {"name": "adversarial", "inner": {"name": "consistency", "steps": 2, "solver_steps": 4}, "heads": "dmd2"},
}


def config(teacher, weights, objective, folder, **train):
    from fewstep.config import parse

    settings = {
        "rounds": 3,
        "batch": 2,
        "lr": 1e-3,
        "log_every": 1,
        "save_every": 3,
        "preview_every": 3,
        "device": "cpu",
        **train,
    }
    return parse(
        {
            "teacher": {"path": teacher, "guidance": 2.0},
            "student": {"weights": weights, "rank": 2},
            "critic": {"weights": weights, "rank": 2},
            "objective": OBJECTIVES[objective],
            "data": {"prompts": f"{folder}/prompts.txt", "aspect": 2.0 if objective == "shapes-dmd" else 1.0}
            if objective.endswith(("dmd", "phased"))
            else {"images": f"{folder}/images"},
            "train": settings,
            "stages": [{}, {"teacher": "previous", "objective": {"conditional": False, "inner": {"steps": 1}}}]
            if objective == "landing"
            else [],
        }
    )


def digest(roles):
    """A hash of every trained role's weights."""
    found = {}
    for name, role in roles.items():
        total = hashlib.sha256()
        for key, value in sorted(role.weights().items()):
            total.update(key.encode() + value.detach().numpy().tobytes())
        found[name] = total.hexdigest()
    return {name: value for name, value in found.items() if name != "teacher"}


class Interrupted:
    """A source that sends its own process Ctrl-C at its n-th draw."""

    def __init__(self, source, n):
        self.source, self.left = source, n

    def draw(self, n, rng):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return self.source.draw(n, rng)


def main(teachers, out):
    import torch

    from fewstep import api

    torch.set_num_threads(1)
    rank, told, run_job = int(os.environ["RANK"]), {}, api.fit
    case = ""

    def watch(job, **options):
        if case == "ctrl-c":  # the two processes are told rounds apart, as two terminals would
            job = replace(job, source=Interrupted(job.source, 3 + 2 * rank))
        told[case] = {"start": digest(job.roles)}
        try:
            return run_job(job, **options)
        finally:
            told[case]["end"] = digest(job.roles)

    api.fit = watch
    for name, weights, objective in CASES:
        case = f"{name}-{weights}-{objective}"
        api.train(config(f"{teachers}/{name}", weights, objective, teachers), Path(out) / case)
    case = "staged"  # what is told is of the second stage
    api.train(config(f"{teachers}/sd", "lora", "landing", teachers, rounds=2), Path(out) / case)
    case = "ctrl-c"
    try:
        long = config(f"{teachers}/sd", "lora", "dmd", teachers, rounds=1000, log_every=4, save_every=1000)
        api.train(long, Path(out) / case)
    except KeyboardInterrupt:
        told[case]["stopped"] = True
    (Path(out) / f"rank-{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(what both processes tell, the folder with their runs)."""
    teachers, out = tmp_path_factory.mktemp("teachers"), tmp_path_factory.mktemp("out")
    save(tiny_sd_pipeline(), teachers / "sd")
    save(tiny_zimage_pipeline(), teachers / "zimage")
    (teachers / "prompts.txt").write_text("a red circle\na blue square\na star\n")
    (teachers / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 0, 90)).save(teachers / f"images/{i}.png")
        (teachers / f"images/{i}.txt").write_text(f"number {i}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FEWSTEP_CACHE": str(out / "cache"), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "--standalone", __file__, str(teachers), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)], out, done.stderr


@pytest.mark.multi
@pytest.mark.parametrize("case", ["-".join(c) for c in CASES])
def test_the_replicas_of_every_role_stay_identical(ran, case):
    (first, second), _, _ = ran
    assert first[case] == second[case]
    assert len(first[case]["start"]) == (2 if case.endswith(("dmd", "phased")) else 3)
    assert all(first[case]["start"][role] != first[case]["end"][role] for role in first[case]["start"])


@pytest.mark.multi
def test_one_process_writes_and_speaks(ran):
    _, out, said = ran
    for name in ("-".join(c) for c in CASES):
        log = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        assert [record["round"] for record in log if "seconds" in record] == [1, 2, 3]  # a preview's record is its own
        assert [f.name for f in (out / name / "checkpoints").iterdir()] == ["step-0000003"]
    assert said.count("train: 3/3") == len(CASES) and said.count("train: 2/2") == 2


@pytest.mark.multi
def test_both_go_on_from_the_stage_before(ran):
    (first, second), out, _ = ran
    assert first["staged"] == second["staged"]
    start, end = (first["staged"][k] for k in ("start", "end"))
    assert start["tutor"] == start["student"] == end["tutor"]  # who teaches is the student of the stage before
    assert all(start[role] != end[role] for role in ("student", "critic", "heads"))
    assert {f.name for f in (out / "staged").iterdir()} == {"config.yaml", "stage-1", "stage-2"}


@pytest.mark.multi
def test_ctrl_c_stops_both_after_the_same_round(ran):
    (first, second), out, _ = ran
    assert first["ctrl-c"]["stopped"] and second["ctrl-c"]["stopped"]
    assert first["ctrl-c"]["end"] == second["ctrl-c"]["end"]
    assert [f.name for f in (out / "ctrl-c/checkpoints").iterdir()] == ["step-0000004"]


if __name__ == "__main__":
    main(*sys.argv[1:])
