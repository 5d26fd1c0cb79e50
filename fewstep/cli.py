"""The `fewstep` command. Every heavy import is inside the command that needs it, so --help answers at once."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from fewstep import __version__

app = typer.Typer(
    name="fewstep",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
COUNTS = "N[,N...]"
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as in train.rounds=100.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False
) -> None:
    """Distils a multi-step diffusion or flow model into a generator that needs 1 to 4 steps."""
    if version:
        typer.echo(f"fewstep {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def say(data: Any, as_json: bool, lines: list[str]) -> None:
    """One answer, for people or for scripts."""
    typer.echo(json.dumps(data, indent=2) if as_json else "\n".join(lines))


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has, each line with a fix where something is missing."""
    from fewstep.doctor import examine

    found = examine()
    width = max(len(c.name) for c in found)
    lines = [f"{'ok ' if c.ok else '-- '} {c.name:<{width}}  {c.value}" + (f"  ({c.fix})" if c.fix else "") for c in found]
    say([c.__dict__ for c in found], as_json, lines)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="objectives, teachers or configs")] = "objectives", as_json: Json = False
) -> None:
    """The objectives, teachers or configs there are."""
    from fewstep.listing import listing

    entries = listing(what)
    width = max((len(e["name"]) for e in entries), default=0)
    lines = [f"{e['name']:<{width}}  {e['about']}" for e in entries]
    say(entries, as_json, lines or ["there is no folder configs here; a checkout of fewstep has one"])


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo")) -> None:
    """Offline, on a CPU, in minutes: distils the embedded teacher, exports, verifies, evaluates and writes report.html."""
    from fewstep.demo import run

    run(out)


@app.command()
def plan(config: Path, set_: Set = None, as_json: Json = False) -> None:
    """Validates a config; shows its deployed grid, roles, parameters, memory and disk. Loads no weights."""
    import yaml

    from fewstep.config import load
    from fewstep.forecast import told
    from fewstep.plan import plan as make

    wanted = load(config, set_ or ())
    found = make(wanted) | {"memory (MiB)": told(wanted)}
    apart = json.loads(json.dumps(found))  # what stands in several places is written out in each
    say(found, as_json, [yaml.safe_dump(apart, sort_keys=False, default_flow_style=None, width=120).rstrip()])


@app.command()
def train(
    config: Path,
    set_: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; if not given, runs/<config name>, or the run whose config it is.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
) -> None:
    """Trains a config."""
    from fewstep import api
    from fewstep.config import load
    from fewstep.drawing import wordless
    from fewstep.zoo import judged

    folder = out or _own_folder(config)
    stored = folder / "config.yaml"
    try:
        wanted = load(config, set_ or ())
        before = api.Run(folder).last.place if resume and stored.exists() else None
        run = api.train(wanted, folder, resume=resume)
    except KeyboardInterrupt:
        begun = stored.exists()
        again = f"fewstep train {quote(str(stored))} --out {quote(str(folder))} --resume"
        typer.echo(f"stopped; to go on: {again if begun else 'the same command, for nothing was begun'}")
        raise typer.Exit(130) from None
    if int(os.environ.get("RANK", "0")) == 0:
        place = quote(str(folder))
        asked = "" if wordless(folder) else " --prompt '...'"
        after = f"sample {place}{asked}", f"export {place} --to OUT", f"eval {place} {judged(wanted.teacher.path)}"
        said = "trained" if run.place != before else "trained already (a higher train.rounds goes on)"
        typer.echo(f"{said}: {run.place}\nnext: " + " | ".join(f"fewstep {x}" for x in after))


def _own_folder(config: Path) -> Path:
    """Where a run goes if nobody says: what a run has stored into its own folder, else into runs/<config name>."""
    traces = ("checkpoints", "metrics.jsonl", "stage-1")
    own = config.name == "config.yaml" and any((config.parent / trace).exists() for trace in traces)
    return config.parent if own else Path("runs") / config.stem


@app.command()
def sample(
    target: Path,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A prompt; may be given several times.")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="A file of prompts (.txt, .jsonl, .csv) or zoo:sprites.")
    ] = None,
    steps: Annotated[
        list[str] | None, typer.Option(metavar=COUNTS, help="Step counts, as in 1,2,4; the trained one if not given.")
    ] = None,
    compare_teacher: Annotated[bool, typer.Option("--compare-teacher", help="Draw the teacher's pictures beside them.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many prompts of the file; where the teacher takes no prompts, pictures (else 4)."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures, over those of an earlier call.")] = Path("samples"),
) -> None:
    """Draws pictures with the student of a run, or of an export: a folder of PNGs with a manifest, and one grid. Of a video it
    keeps the middle frame."""
    from fewstep.drawing import draw

    where = draw(target, list(prompt or ()), prompts, _counts(steps), compare_teacher, seed, count, out)
    typer.echo(f"pictures: {where}")


@app.command()
def export(
    run: Path,
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    weights: Annotated[str | None, typer.Option(help="lora or full; what the student is, if not given.")] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="A LoRA's layout: diffusers, peft, comfyui or kohya; what stock code loads, if not given."),
    ] = None,
) -> None:
    """Writes what stock Diffusers or ComfyUI loads: a LoRA or a full pipeline, its scheduler, a model card."""
    from fewstep.api import Run

    place = Run(run).export(to, form=weights, layout=format_)
    typer.echo(f"exported: {place}\nnext: fewstep verify {quote(str(place))}")


@app.command()
def verify(
    folder: Path,
    teacher: Annotated[str | None, typer.Option(help="Where a LoRA's teacher is now, if not where it was.")] = None,
    as_json: Json = False,
) -> None:
    """Proves in a fresh process without fewstep that stock Diffusers runs an export as it was trained."""
    from fewstep.verify import verify as prove

    report = prove(folder, teacher)
    lines = [f"{'ok ' if c.ok else 'NOT'} {c.name}: {c.detail}" for c in report.checks]
    say({"ok": report.ok, "checks": [c.__dict__ for c in report.checks]}, as_json, lines)
    if not report.ok:
        raise typer.Exit(2)


@app.command()
def push(
    target: Annotated[Path, typer.Argument(help="An export, or a run, which is exported into its own folder first.")],
    hub_id: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go there, and stop.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, where it is new.")] = False,
) -> None:
    """Uploads an export to the Hugging Face hub: shows its model card and files, asks, and only then touches the network."""
    from fewstep.push import check_id, pack, send

    check_id(hub_id)
    if (target / "config.yaml").exists():
        from fewstep.api import Run

        target = Run(target).export(target / "export")
    parcel = pack(target, hub_id)
    typer.echo("\n".join(parcel.lines()))
    if dry_run:
        return
    if not yes and not sys.stdin.isatty():
        raise ValueError("nothing was sent: nobody can be asked here; add --yes")
    if not yes and not typer.confirm(f"Send this to {hub_id}?"):
        typer.echo("nothing was sent")
        return
    typer.echo(f"pushed: {send(parcel, private=private)}")


@app.command("eval")
def eval_(
    target: Path,
    protocol: Annotated[
        str, typer.Option(help="inception (beside your own images), sprites, sprites-quick, clouds, or a YAML file.")
    ] = "inception",
    reference: Annotated[str | None, typer.Option(metavar="FOLDER", help="Images to compare with, over the protocol's.")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="What to draw: .txt, .jsonl, .csv, or a folder of captioned images.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=8, help="How many pictures are judged.")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="Cut the reference images to squares of this side.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file; if not given, results.json in a run or export, else ./NAME.results.json.")
    ] = None,
    steps: Annotated[
        list[str] | None,
        typer.Option(metavar=COUNTS, help="Student step counts, as in 1,4; 1, 2, 4 and the trained one if not given."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Judge the teacher again instead of reading its card.")] = False,
    teacher: Annotated[bool, typer.Option(help="Rows of the teacher beside the student's.")] = True,
) -> None:
    """Scores a run, an export, a pipeline folder or a folder of images; writes results.json."""
    from fewstep.judging import evaluate, table

    given = {"reference": reference, "prompts": prompts, "n": n, "size": size}
    results, where = evaluate(target, protocol, out=out, steps=_counts(steps), fresh=fresh, teacher=teacher, given=given)
    typer.echo(table(results) + f"\nwritten: {where}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """One self-contained page: curves, grids, metric table, quality against steps."""
    from fewstep.judging import report_runs

    typer.echo(f"written: {report_runs(runs, out)}")


def _counts(given: list[str] | None) -> list[int]:
    """Step counts, several of them apart or with commas between. Raises ValueError for what is none."""
    words = [word.strip() for text in given or () for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdecimal() and int(word) >= 1):
            raise ValueError(f"--steps wants counts of at least 1, as in --steps 1,2,4, not {word!r}")
    return [int(word) for word in words]


def _on_one_line(message: Warning | str, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
    return f"fewstep: {' '.join(str(message).split())}\n"


def main() -> None:
    """Runs the command; a user's mistake is one sentence and exit code 2, ours a traceback and 1. A warning is one line."""
    warnings.formatwarning = _on_one_line
    if "-h" in sys.argv[1:]:
        sys.argv[sys.argv.index("-h")] = "--help"
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of other packages; ours are plain lines then
    try:
        sys.exit(app(standalone_mode=False))  # the code of a typer.Exit; a command itself returns nothing
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        click_error = type(error).__module__.startswith(("click", "typer"))
        if click_error and hasattr(error, "format_message"):
            said = error.format_message()
            several = "unexpected extra argument" in said and "--steps" in sys.argv
            print(f"fewstep: {said}{'; several counts are --steps 1,2,4' if several else ''}", file=sys.stderr)
            sys.exit(2)
        if isinstance(error, ValueError | OSError) and not os.environ.get("FEWSTEP_TRACEBACK"):
            print(f"fewstep: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
