"""Trains and judges configs over several seeds: `python eval/distill.py CONFIG ... [--seeds 0 1 2] [--protocol sprites]`.

Writes eval/results/NAME.json: the rows of every seed (teacher rows once), training seconds, and for each step count the mean, the
standard deviation and the worst of the student's Frechet distance. Runs lie in runs/NAME-seedN and are resumed, not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from fewstep import api
from fewstep.config import load
from fewstep.evaluation import results
from fewstep.judging import evaluate, table


def distil(config: Path, seed: int, protocol: str, rounds: int | None) -> tuple[dict[str, Any], float]:
    """One seed of a config: (results, training seconds)."""
    folder = Path("runs") / f"{config.stem}-seed{seed}"
    extra = [f"train.rounds={rounds}"] if rounds else []
    settings = load(config, [f"train.seed={seed}", *extra])
    run = api.train(settings, folder, resume=(folder / "config.yaml").exists())
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    found, _ = evaluate(run.folder, protocol, out=folder / "results.json", steps=[], fresh=False, teacher=True)
    return found, json.loads(last)["seconds"]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--protocol", default="sprites")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for config in args.configs:
        rows: list[dict[str, Any]] = []
        seconds = []
        for seed in args.seeds:
            found, took = distil(config, seed, args.protocol, args.rounds)
            rows += [r for r in found["rows"] if r["model"] == "teacher" and not seconds]
            rows += [{**r, "seed": seed} for r in found["rows"] if r["model"] == "student"]
            seconds.append(took)
        merged = {**found, "rows": rows, "environment": found["environment"]}
        place = args.out / f"{config.stem}.json"
        results.write(place, merged)
        record = {"config": str(config), "train_seconds": seconds, "students": summary(rows)}
        place.with_suffix(".summary.json").write_text(json.dumps(record, indent=2) + "\n")
        print(table(merged), json.dumps(record, indent=2), sep="\n", flush=True)


if __name__ == "__main__":
    main()
