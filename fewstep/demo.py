"""`fewstep demo`: the main job on the embedded teacher, from nothing to a report, offline on a CPU."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import typer

from fewstep import api
from fewstep.config import parse
from fewstep.evaluation import results
from fewstep.export import refuse_foreign
from fewstep.judging import check_files, evaluate, report_runs, table
from fewstep.verify import verify

PROTOCOL = "sprites-quick"
# Sized for two CPU cores and eight minutes. At timestep 699 an error of the noise is 3 times as large in x0, at 999 15 times.
CONFIG = {
    "teacher": {"path": "zoo:sprites-sd", "guidance": 3.0},
    "student": {"weights": "full", "conditioning_timestep": 699},
    "critic": {"weights": "full"},
    "objective": {"name": "dmd", "steps": 4},
    "data": {"prompts": "zoo:sprites"},
    "train": {"rounds": 120, "batch": 32, "lr": 2.0e-4, "critic_lr": 4.0e-4, "save_every": 60, "preview_every": 60},
}


def run(out: Path) -> None:
    """Distils, exports, verifies, evaluates and reports into `out`; goes on where an earlier demo was stopped.

    Raises ValueError, before anything is trained, where one of these would go over what an earlier demo did not make."""
    began = time.time()
    torch.set_num_threads(1)  # networks this small lose more to waiting threads on a busy machine than a second one gains
    folder, numbers, page, export = out / "run", out / "results.json", out / "report.html", out / "export"
    check_files(PROTOCOL, [numbers, folder / "results.json"], page)
    refuse_foreign(export)
    config = parse(CONFIG)
    typer.echo(f"1/4 distilling {config.teacher.path} with {config.objective.steps}-step dmd on this CPU")
    done = api.train(config, folder, resume=(folder / "config.yaml").exists())
    typer.echo("2/4 scoring teacher and student")
    found, _ = evaluate(folder, PROTOCOL, out=folder / "results.json", steps=[1, 2, 4], fresh=False, teacher=True)
    results.write(numbers, found)
    typer.echo(table(found))
    typer.echo("3/4 exporting for stock Diffusers, and proving it in a fresh process")
    done.export(export)
    proof = verify(export)
    if not proof.ok:
        raise RuntimeError(f"the export does not verify: {proof}")
    typer.echo("4/4 writing the report")
    report_runs([folder], page)
    typer.echo(f"done in {time.time() - began:.0f} s\n  report   {page}\n  numbers  {numbers}\n  export   {export}")
