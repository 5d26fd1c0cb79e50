"""The `fewstep` command. Every heavy import is inside the command that needs it, so --help answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="fewstep",
    help="Distils a multi-step diffusion or flow model into a generator that needs 1 to 4 steps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as in train.rounds=100.")]


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
    say(entries, as_json, [f"{e['name']:<{width}}  {e['about']}" for e in entries])


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
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<config name> if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
) -> None:
    """Trains a config."""
    from fewstep import api
    from fewstep.config import load

    folder = out or Path("runs") / config.stem
    try:
        run = api.train(load(config, set_ or ()), folder, resume=resume)
    except KeyboardInterrupt:
        stored = folder / "config.yaml"
        again = (
            f"fewstep train {stored} --out {folder} --resume" if stored.exists() else "the same command, for nothing was begun"
        )
        typer.echo(f"stopped; to go on: {again}")
        raise typer.Exit(130) from None
    if int(os.environ.get("RANK", "0")) == 0:
        after = f"sample {folder} --prompt '...'", f"export {folder} --to OUT", f"eval {folder} --protocol sprites"
        typer.echo(f"trained: {run.place}\nnext: " + " | ".join(f"fewstep {x}" for x in after))


@app.command()
def sample(
    target: Path,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A file of prompts (.txt, .jsonl, .csv) or zoo:sprites.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Step counts; the trained one if not given.")] = None,
    compare_teacher: Annotated[bool, typer.Option("--compare-teacher", help="Draw the teacher's pictures beside them.")] = False,
    seed: int = 0,
    count: Annotated[int | None, typer.Option(help="At most so many prompts of the file.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
) -> None:
    """Draws pictures with the student of a run, or of an export: a folder of PNGs with a manifest, and one grid."""
    from fewstep.drawing import draw

    where = draw(target, list(prompt or ()), prompts, steps or [], compare_teacher, seed, count, out)
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
    typer.echo(f"exported: {place}\nnext: fewstep verify {place}")


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
    protocol: Annotated[str, typer.Option(help="The name of a protocol in eval/protocols, or a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="JSON file; results.json in the target if not given.")] = None,
    steps: Annotated[
        list[int] | None, typer.Option(help="Student step counts; 1, 2, 4 and the trained one if not given.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure the teacher again instead of reading its card.")] = False,
    teacher: Annotated[bool, typer.Option(help="Rows of the teacher beside the student's.")] = True,
) -> None:
    """Scores a run, an export, a pipeline folder or a folder of images; writes results.json."""
    from fewstep.judging import evaluate, table

    results, where = evaluate(target, protocol, out=out, steps=steps or [], fresh=fresh, teacher=teacher)
    typer.echo(table(results) + f"\nwritten: {where}")


@app.command()
def report(runs: list[Path], out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html")) -> None:
    """One self-contained page: curves, grids, metric table, quality against steps."""
    from fewstep.judging import report_runs

    typer.echo(f"written: {report_runs(runs, out)}")


def main() -> None:
    """Runs the command; a user's mistake is one sentence and exit code 2, ours a traceback and 1."""
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
            print(f"fewstep: {error.format_message()}", file=sys.stderr)
            sys.exit(2)
        if isinstance(error, ValueError | OSError) and not os.environ.get("FEWSTEP_TRACEBACK"):
            print(f"fewstep: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
