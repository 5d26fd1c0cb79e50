"""Kills a training at random instants until it is done: `python tests/kill.py TEACHER WORK KILLS SEED`.

Everything is imported once; every attempt is a forked process of its own, so that a kill costs no import. Half of the kills are
aimed at the moment when a checkpoint is being written. Prints {"kills", "while saving", "rounds seen"} as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fewstep import api
from fewstep.config import parse
from fewstep.preview import Preview

torch.set_num_threads(1)


def settings(teacher: str, prompts: str, rounds: int) -> dict:
    return {
        "teacher": {"path": teacher, "guidance": 2.0},
        "student": {"weights": "lora", "rank": 2},
        "critic": {"weights": "lora", "rank": 2},
        "objective": {"name": "dmd", "steps": 1, "critic_turns": 1},
        "data": {"prompts": prompts},
        "train": {"rounds": rounds, "batch": 1, "lr": 1e-3, "save_every": 1, "log_every": 1, "preview_every": 1000, "ema": 0.9},
    }


def attempt(tree: dict, folder: Path) -> int:
    """The id of a process that trains, from wherever the folder is."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = (folder.parent / f"{folder.name}.log").open("a")
        api.train(parse(tree), folder, resume=(folder / "config.yaml").exists())
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def newest(folder: Path) -> int:
    found = sorted((folder / "checkpoints").glob("step-*"))
    return int(found[-1].name.split("-")[1]) if found else 0


def reached(folder: Path, round_: int) -> bool:
    return newest(folder) >= round_


def files(folder: Path) -> set[Path]:
    return set((folder / "checkpoints").rglob("*"))


def changed(folder: Path, before: set[Path]) -> bool:
    return files(folder) != before


def wait(child: int, ready: Callable[[], bool]) -> None:
    """Returns when it is ready. Raises SystemExit where the process has ended before."""
    while not ready():
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            raise SystemExit(f"an attempt ended with {os.waitstatus_to_exitcode(status)} before it could be killed")
        time.sleep(0.0005)


def main(teacher: str, work: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    Preview.__call__ = lambda *_: None  # type: ignore[method-assign]  # 50 teacher steps that nobody looks at
    prompts = work / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    tree = settings(teacher, str(prompts), 3 * kills + 4)

    began = time.monotonic()
    child = attempt(tree, work / "whole")
    wait(child, lambda: (work / "whole" / "config.yaml").exists())
    loading = time.monotonic() - began
    os.waitpid(child, 0)
    a_round = (time.monotonic() - began - loading) / tree["train"]["rounds"]

    folder, hits, seen = work / "killed", 0, []
    for number in range(kills):
        # Anywhere from before the folder exists to two rounds on, and then every other time while a checkpoint is written.
        ahead = rng.choice((0, 1, 2))
        before, delay = newest(folder), rng.uniform(0, a_round if ahead else loading)
        child = attempt(tree, folder)
        wait(child, partial(reached, folder, before + ahead))
        time.sleep(delay)
        if number % 2:  # the next thing that happens there is that a checkpoint is begun, or an old one removed
            wait(child, partial(changed, folder, files(folder)))
            time.sleep(rng.uniform(0, 0.003))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        hits += any((folder / "checkpoints").glob(".*"))
        seen.append(newest(folder))
    last = attempt(tree, folder)
    if os.waitstatus_to_exitcode(os.waitpid(last, 0)[1]):
        raise SystemExit("the last attempt failed: " + (work / "killed.log").read_text()[-2000:])
    print(json.dumps({"kills": kills, "while saving": hits, "rounds seen": seen, "loading": loading, "round": a_round}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
