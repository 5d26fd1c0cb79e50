"""Trains and judges configs over several seeds: `python eval/distill.py CONFIG ... [--seeds 0 1 2] [--protocol NAME]`.

Writes eval/results/NAME.json: the rows of every seed (teacher rows once; --teacher takes them from another config's results),
and NAME.summary.json: teacher, training seconds (on the wall, and of processors), peak memory, passes a round, for each step
count the mean, the standard deviation and the worst of the student's Frechet distance, and the config's settings. Runs lie in
runs/NAME-seedN and are resumed, not repeated. Then `python eval/leaderboard.py` renders what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fewstep import api
from fewstep.config import TeacherConfig, load
from fewstep.evaluation import results
from fewstep.evaluation.protocol import load_protocol
from fewstep.judging import evaluate, table
from fewstep.stages import traces
from fewstep.zoo import home


def distil(
    config: Path, seed: int, protocol: str, rounds: int | None, teacher: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One seed of a config: (results, with the teacher's rows where they are wanted; what the run logged)."""
    folder = Path("runs") / f"{config.stem}-seed{seed}"
    extra = [f"train.rounds={rounds}"] if rounds else []
    settings = load(config, [f"train.seed={seed}", *extra])
    run = api.train(settings, folder, resume=(folder / "config.yaml").exists())
    log = list(chain(folder))
    found, _ = evaluate(run.folder, protocol, out=None, steps=[], fresh=False, teacher=teacher)
    return {**found, "rows": [r for r in found["rows"] if teacher or r["model"] != "teacher"]}, log


def chain(folder: Path) -> Iterator[dict[str, Any]]:
    """What a run logged, stage after stage; seconds count from the beginning of the first."""
    before = {"seconds": 0.0, "cpu_seconds": 0.0}
    for part in traces(folder).values():
        log = [json.loads(line) for line in (part / "metrics.jsonl").read_text().splitlines()]
        yield from ({**r, **{k: v + r[k] for k, v in before.items() if r.get(k) is not None}} for r in log)
        before = {k: v + max((r[k] for r in log if r.get(k) is not None), default=0.0) for k, v in before.items()}


def costs(logs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Of each seed's log: training seconds and peak memory (1e9 bytes); over all: passes of a batch a round by network, those
    with a graph as NAME_backward. null for what a log does not say."""

    def most(log: list[dict[str, Any]], key: str) -> float | None:
        return max((r[key] for r in log if r.get(key) is not None), default=None)

    made: dict[str, list[float]] = {}
    for log in logs:
        for name, value in ((k, v) for r in log for k, v in r.items() if k.startswith("passes/")):
            made.setdefault(name.removeprefix("passes/"), []).append(value)
    return {
        "train_seconds": [most(log, "seconds") for log in logs],
        "train_cpu_seconds": [most(log, "cpu_seconds") for log in logs],
        "peak_gb": [most(log, "peak_gb") for log in logs],
        "passes": {name: statistics.mean(values) for name, values in made.items()} or None,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Over seeds, by steps: mean, deviation and worst FD of the student, mean KID and accuracy."""
    out = {}
    for steps in sorted({r["steps"] for r in rows if r["model"] == "student"}):
        mine = [r for r in rows if r["model"] == "student" and r["steps"] == steps]
        fd = [r["fd"] for r in mine]
        out[str(steps)] = {
            "fd_mean": statistics.mean(fd),
            "fd_std": statistics.stdev(fd) if len(fd) > 1 else 0.0,
            "fd_worst": max(fd),
            "kid_mean": statistics.mean(r["kid"] for r in mine),
            "accuracy_mean": statistics.mean(r["accuracy"] for r in mine if "accuracy" in r),
        }
    return out


def named(teacher: TeacherConfig) -> str:
    """A teacher with the scale of guidance that it teaches at, which is another teacher at another."""
    return teacher.path if teacher.guidance is None else f"{teacher.path} w={teacher.guidance:g}"


def teacher_rows(place: Path, settings: TeacherConfig, protocol: str) -> list[dict[str, Any]]:
    """The teacher's rows in the results of another config. Raises ValueError where another teacher or protocol was measured."""
    known = json.loads(place.read_text(encoding="utf-8"))
    whose = json.loads(place.with_suffix(".summary.json").read_text(encoding="utf-8"))["teacher"]
    if (whose, known["protocol"]["hash"]) != (named(settings), load_protocol(protocol).hash):
        raise ValueError(
            f"{place} measured {whose} by the protocol {known['protocol']['name']}, not {named(settings)} by {protocol} as it is "
            "now; leave --teacher out, to measure it"
        )
    return [row for row in known["rows"] if row["model"] == "teacher"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--protocol", help="if not given, that of the teacher's world in the zoo")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    parser.add_argument("--teacher", type=Path, help="results of a config with the same teacher, to take its rows from")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for config in args.configs:
        settings = load(config)
        protocol = args.protocol or home(settings.teacher.path)
        rows = teacher_rows(args.teacher, settings.teacher, protocol) if args.teacher else []
        logs: list[list[dict[str, Any]]] = []
        for seed in args.seeds:
            found, log = distil(config, seed, protocol, args.rounds, teacher=not (logs or args.teacher))
            rows += [r for r in found["rows"] if r["model"] == "teacher"]
            rows += [{**r, "seed": seed} for r in found["rows"] if r["model"] == "student"]
            logs.append(log)
        merged = {**found, "rows": rows, "environment": found["environment"]}
        place = args.out / f"{config.stem}.json"
        results.write(place, merged)
        record = {"config": str(config), "teacher": named(settings.teacher), **costs(logs), "students": summary(rows)}
        record |= {"settings": settings.model_dump(mode="json")}
        place.with_suffix(".summary.json").write_text(json.dumps(record, indent=2) + "\n")
        print(table(merged), json.dumps(record, indent=2), sep="\n", flush=True)


if __name__ == "__main__":
    main()
