"""Which family learns under which objective: `python eval/matrix.py [--families sd flux ...]` writes README's table.

A cell takes the tiny random pipeline of a family (tests/tiny) through two rounds of an objective with LoRA or full weights, by
the trainer itself: every update finite, each turn's movers moved and nobody else, the student exported, the export proved by
stock Diffusers. It shows that the parts fit together and nothing of quality. A cell that is not run keeps what README says.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep import checkpoint, proof
from fewstep.api import Run
from fewstep.config import Config, parse
from fewstep.data import open_source
from fewstep.families import family_of
from fewstep.folders import pipeline_name
from fewstep.objectives import Needs, Objective, Turn
from fewstep.study import Study, open_study
from fewstep.trainer import Job, fit

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
from tiny import MAKERS, save  # noqa: E402

OBJECTIVES: dict[str, dict[str, Any]] = {
    "dmd": {"steps": 2, "critic_turns": 1},
    "consistency": {"steps": 2, "solver_steps": 16},  # where one step is a segment, a teacher without guidance is at rest
    "sid": {"steps": 2, "critic_turns": 1},
    "adversarial": {"inner": {"name": "dmd", "steps": 2, "critic_turns": 1}},
}
WEIGHTS = ("lora", "full")
COLUMNS = [(objective, weights) for objective in OBJECTIVES for weights in WEIGHTS]
START, END = "<!-- matrix: python eval/matrix.py -->", "<!-- end of matrix -->"
UNKNOWN = "not run"

Cell = tuple[str, str, str]  # family, objective, weights
Table = dict[Cell, str]


@dataclass(frozen=True)
class Watched:
    """An objective whose turns are looked at from outside. Raises ValueError after a turn that moved others than its movers."""

    inner: Objective
    study: Study

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def round(self, step: int) -> Iterator[Turn]:
        for turn in self.inner.round(step):
            before = self._weights()
            yield turn  # the trainer makes the update
            after = self._weights()
            moved = {name for name in after if any(not torch.equal(after[name][k], before[name][k]) for k in after[name])}
            wanted = {*turn.movers, *turn.followers}
            if "student" in wanted and "average" in self.study.roles:
                wanted.add("average")  # which follows it
            if moved != wanted:
                raise ValueError(f"round {step}, the {turn.player}'s turn: {sorted(moved)} moved, not {sorted(wanted)}")

    def _weights(self) -> dict[str, Mapping[str, torch.Tensor]]:
        found = {name: role.weights() for name, role in self.study.roles.items() if name != "teacher"}
        base = self.study.roles["teacher"].net.named_parameters()
        found["teacher"] = {k: p for k, p in base if ".lora_" not in k}
        return {name: {k: p.detach().clone() for k, p in own.items()} for name, own in found.items()}


def learn(config: Config, folder: Path) -> Run:
    """The run of a config, watched. Raises ValueError if an update was not finite."""
    study = open_study(config)
    data = config.data
    wanted = config.objective.needs.images
    source = open_source(study.teacher, prompts=data.prompts, images_needed=wanted, pairs=study.pairs(), cache=None)
    folder.mkdir()
    (folder / "config.yaml").write_text(config.dump())
    watched: Any = Watched(config.objective, study)
    fit(Job(watched, study.roles, study.nets, source, config.train, folder, {"grid": study.grid, "sampler": study.sampler}))
    run = Run(folder)
    run.study = study  # which has these very weights: no average is kept
    if not all(bool(torch.isfinite(v).all()) for v in run.weights.values()):
        raise ValueError("the student's weights are not finite")
    skipped = {k: v for k, v in checkpoint.load(run.place)[1]["skipped"].items() if v}
    if skipped:
        raise ValueError(f"updates were not finite: {skipped}")
    return run


def config_of(
    family: str, objective: Mapping[str, Any], weights: str, teacher: Path, scratch: Path, checkpointing: bool = False
) -> Config:
    """Two rounds of an objective on a family's tiny pipeline. Raises ValueError where a config may not say that."""
    prompts = scratch / "prompts.txt"
    prompts.write_text("\n".join(words or "nothing" for words in family_of(pipeline_name(teacher)).examples))
    tree = {
        "teacher": {"path": str(teacher), "size": MAKERS[family][1], "guidance": 3.0},
        "student": {"weights": weights, "rank": 2},
        "critic": {"weights": weights, "rank": 2},
        "objective": objective,
        # The teacher's own samples are the images: of video no others are read.
        "data": {"prompts": str(prompts), "pairs": 2, "pairs_steps": 2},
        "train": {"rounds": 2, "batch": 2, "lr": 1e-3, "ema": 0.0, "device": "cpu", "checkpointing": checkpointing},
    }
    return parse(tree)


def proved(run: Run, scratch: Path) -> list[str]:
    """What the proof of a run's export found, by name. Raises ValueError for whatever fails."""
    checks = proof.prove(run.export(scratch / "out"), run.config.teacher.path, scratch)
    if failed := [f"{c['name']}: {c['detail']}" for c in checks if not c["ok"]]:
        raise ValueError(failed[0])
    return [c["name"] for c in checks]


def prove(cell: Cell, teacher: Path, scratch: Path) -> list[str]:
    """What the proof of a cell's export found, by name. Raises ValueError for whatever fails."""
    family, objective, weights = cell
    config = config_of(family, {"name": objective, **OBJECTIVES[objective]}, weights, teacher, scratch)
    return proved(learn(config, scratch / "run"), scratch)


def saved(family: str, folder: Path) -> Path:
    """The tiny pipeline of a family as a Diffusers folder, under `folder`."""
    place = folder / family
    return place if place.exists() else save(MAKERS[family][0](), place)


def read(text: str) -> Table:
    """What a README's table says."""
    inside = text.partition(START)[2].partition(END)[0]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in inside.splitlines() if line.startswith("| `")]
    return {(row[0].strip("`"), *c): value for row in rows for c, value in zip(COLUMNS, row[1:], strict=True)}


def written(text: str, table: Table) -> str:
    """A README whose table says this, a row a family."""
    head = ["teacher", *(f"`{objective}` {'LoRA' if weights == 'lora' else weights}" for objective, weights in COLUMNS)]
    rows = [[f"`{family}`", *(table.get((family, *c), UNKNOWN) for c in COLUMNS)] for family in MAKERS]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
    return re.sub(f"{re.escape(START)}.*?{re.escape(END)}", lambda _: f"{START}\n\n{lines}\n\n{END}", text, flags=re.S)


def cells(families: Sequence[str]) -> list[Cell]:
    """The matrix of some families."""
    return [(family, *column) for column in COLUMNS for family in families]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    families, readme, failed = parser.parse_args().families, ROOT / "README.md", False
    with tempfile.TemporaryDirectory() as root:
        for cell in cells(families):
            scratch = Path(root) / "-".join(("cell", *cell))
            scratch.mkdir()
            found, reason = "ok", ""
            try:
                prove(cell, saved(cell[0], Path(root)), scratch)
            except Exception as error:  # whatever stops a cell is what the table has to say of it
                found, failed, reason = "fails", True, f": {type(error).__name__}: {error}"
            text = readme.read_text()  # at once: an interrupted command leaves what it has shown
            readme.write_text(written(text, {**read(text), cell: found}))
            print(*cell, f"{found}{reason}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
