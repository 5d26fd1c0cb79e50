"""Proof that stock Diffusers draws what an export promises: `python -I proof.py FOLDER TEACHER SCRATCH`.

`verify` runs this file in a fresh interpreter where `import fewstep` fails. It reads the export the way its card says, prints
one line of JSON, [{"name", "ok", "detail"}, ...], and knows nothing but torch, Diffusers and safetensors.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PIPELINES = ("phased.py", "told.py")  # what runs students that no stock pipeline does; they lie beside this file
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FORMAT = 3  # of fewstep.json
KINDS: dict[str, Any] = {  # what everything that reads fewstep.json relies on
    "teacher": dict,
    "base_pipeline": str,
    "pipeline": str,
    "components": list,
    "runs_by": (str, type(None)),
    "form": str,
    "sampler": str,
    "steps": int,
    "times": dict,
    "call": dict,
}
PIXELS = 1e-4  # largest difference from the reference, of pixels in [0, 1]
SAME = 1e-6  # the same where both come from stock Diffusers

Check = dict[str, Any]


def beside(name: str) -> Any:
    """A module that lies beside this file, which no package holds here."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


strength = beside("strength")
Broken = strength.Broken  # a check that failed, as a sentence


class Blocker:
    """An import hook under which fewstep does not exist."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "fewstep":
            raise ImportError("an export may not need fewstep")


def prove(folder: Path, teacher: str, scratch: Path) -> list[Check]:
    """Every check of an export; those that need an earlier one that failed are left out. teacher: what a LoRA is loaded on."""
    checks: list[Check] = []

    def check(name: str, test: Callable[..., Any], *args: Any) -> Any:
        """Runs a test, which returns its detail (str) or something for later tests; None if it failed."""
        try:
            value = test(*args)
        except Exception as error:  # whatever a broken export makes stock code do is a finding, not a crash
            text = " ".join(str(error).split())[:300]
            if not isinstance(error, Broken):
                text = f"stock Diffusers stopped here: {type(error).__name__}: {text}"
            checks.append({"name": name, "ok": False, "detail": text})
            return None
        checks.append({"name": name, "ok": True, "detail": value if isinstance(value, str) else ""})
        return value

    check("no pickles", _no_pickles, folder)
    facts = check("files", read, folder)
    if facts is None:
        return checks
    lora = facts.get("lora")
    if facts["runs_by"] and check("pipeline", own_pipeline, folder, facts["runs_by"]) is None:
        return checks
    if lora and check("teacher", _teacher, facts, teacher) is None:
        return checks
    pipe = check("loads", load, folder, facts, teacher)
    if pipe is None:
        return checks
    if lora:
        check("LoRA on every layer at scale 1", strength.check, folder, facts, pipe)
    reference = Reference(folder)
    drawn = None
    for n in sorted(map(int, facts["times"])):
        drawn = check(f"runs in {n}", draw, pipe, facts, reference, n)
        if drawn is not None:
            check(f"times at {n}", _times, drawn[0], facts["times"][str(n)])
            check(f"pixels at {n}", _pixels, drawn[1], reference, n)
    if drawn is not None:  # in the most steps, where the most noise is drawn
        again = check("same seed, same picture", _again, drawn[1], pipe, facts, reference, n)
        if lora and again is not None and lora["reader"] != "keys" and not facts["runs_by"]:
            check("same picture without the LoRA's metadata", _blind, drawn[1], folder, scratch, pipe, facts, reference, n)
    return checks


def _no_pickles(folder: Path) -> str:
    found = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.suffix in PICKLES)
    if found:
        raise Broken(f"{found[0]} is a pickle, which can run code when read; an export is safetensors only")
    return ""


def stated(folder: Path) -> dict[str, Any]:
    """What fewstep.json says of an export."""
    try:
        facts = json.loads((folder / "fewstep.json").read_text("utf-8"))
    except ValueError as error:
        raise Broken(f"fewstep.json is damaged ({error}); export again") from error
    if not isinstance(facts, dict):
        raise Broken("fewstep.json is damaged (it holds no object); export again")
    if facts.get("format") != FORMAT:
        raise Broken(f"fewstep.json has format {facts.get('format')}, not {FORMAT}; use the fewstep that made it")
    kinds = KINDS | ({"lora": dict} if facts.get("form") == "lora" else {})
    wrong = [key for key, kind in kinds.items() if not isinstance(facts.get(key, ...), kind)]
    wrong += [] if wrong or isinstance(facts["teacher"].get("path"), str) else ["teacher.path"]
    if wrong:
        raise Broken(f"fewstep.json is damaged (it does not say {wrong[0]} as it should); export again")
    return facts


def read(folder: Path) -> dict[str, Any]:
    """The facts of an export whose files can all be read."""
    from safetensors import SafetensorError, safe_open

    facts = stated(folder)
    wanted = ["reference.safetensors", "README.md", "scheduler/scheduler_config.json"]
    experts = [file for file in facts.get("experts", {}).get("files", {}).values() if file]
    wanted += experts or [lora["file"] for lora in (strength.each(facts).values() if facts["form"] == "lora" else ())]
    wanted += ["model_index.json"] * (facts["form"] == "full") + [facts["runs_by"]] * bool(facts["runs_by"])
    wanted += [facts["ends"]["file"]] if "ends" in facts else []
    if missing := [f for f in wanted if not (folder / f).exists()]:
        raise Broken(f"{missing[0]} is missing; export again")
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise Broken(f"{file.relative_to(folder)} is damaged ({error}); export again") from error
    return facts


def _teacher(facts: dict[str, Any], teacher: str) -> str:
    wanted = facts["teacher"]["model_index_sha256"]
    index = Path(teacher) / "model_index.json"
    if wanted and index.exists() and hashlib.sha256(index.read_bytes()).hexdigest() != wanted:
        raise Broken(f"{teacher} is not the teacher this LoRA was trained on (its model_index.json differs)")
    return teacher


def own_pipeline(folder: Path, name: str) -> str:
    """The pipeline of an export is code: only the one that lies beside this file is ever run."""
    if name not in PIPELINES or (folder / name).read_bytes() != Path(__file__).with_name(name).read_bytes():
        raise Broken(f"{name} is not the one this fewstep exports, and is not run; export again, or verify with that")
    return ""


def load(folder: Path, facts: dict[str, Any], teacher: str) -> Any:
    """The pipeline as the card says, in float32 on the CPU."""
    import diffusers
    import torch

    lora = facts.get("lora")
    if facts["runs_by"]:
        pipe = beside(Path(facts["runs_by"]).stem).load(folder, *([teacher] if lora else []))
    else:
        kind = getattr(diffusers, facts["pipeline"])
        pipe = kind.from_pretrained(teacher if lora else folder, dtype=torch.float32)
    if lora and not facts["runs_by"]:
        strength.attach(pipe, folder, facts)
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
        pipe.scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(folder, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # it paints pictures black; the reference has none
    return pipe


class Reference:
    """What the export's pictures must be: latents, what is asked for and seed, and fewstep's own pictures for them."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        with safe_open(folder / "reference.safetensors", "pt") as file:
            notes = file.metadata()
            self.tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        self.ask = json.loads(notes["ask"])
        self.seed, self.stride = int(notes["seed"]), int(notes["stride"])


@contextmanager
def _watched(nets: list[Any]) -> Iterator[list[float]]:
    """The times networks are fed while the pipeline runs."""
    import torch

    seen: list[float] = []
    signature = inspect.signature(nets[0].forward)

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = signature.bind(*args, **kwargs).arguments
        seen.append(float(torch.as_tensor(values.get("timestep", values.get("t"))).flatten()[0]))

    hooks = [net.register_forward_pre_hook(note, with_kwargs=True) for net in nets]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def draw(pipe: Any, facts: dict[str, Any], reference: Reference, n: int) -> tuple[list[float], Any]:
    """(times the network saw, pictures (B, C, H, W) or videos (B, F, C, H, W) in [0, 1]) of the documented call in n steps."""
    import torch

    latents = reference.tensors["latents"]
    # Torch's own generator, as on the card: some pipelines hand their scheduler none, and it draws from that one.
    call = {**facts["call"], "num_inference_steps": n, "generator": torch.manual_seed(reference.seed)}
    if "sigmas" in call:
        call["sigmas"] = [1 - i / n for i in range(n)]
    ask = copy.deepcopy(reference.ask)  # ZImagePipeline writes its chat template into the caller's list
    # Pipelines that take no latents draw them themselves; some give arrays.
    given = "latents" in inspect.signature(pipe.__call__).parameters
    with _watched([getattr(pipe, name) for name in facts["components"]]) as seen:
        drawn = pipe(**ask, **call, **({"latents": latents.clone(), "output_type": "pt"} if given else {"output_type": "np"}))
    pictures = drawn.images if "images" in drawn else drawn.frames
    if not given:
        pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    return seen, pictures


def _gap(a: Any, b: Any) -> float:
    return float((a - b).abs().max())


def _times(seen: list[float], wanted: list[float]) -> str:
    close = 1e-6 * max(1.0, *map(abs, wanted))  # 1e-3 on a clock of 1000
    shown = ", ".join(f"{t:.6g}" for t in seen)
    if len(seen) != len(wanted) or not all(abs(a - b) <= close for a, b in zip(seen, wanted, strict=True)):
        trained = ", ".join(f"{t:.6g}" for t in wanted)
        raise Broken(f"the network saw {shown}, but was trained at {trained}: the scheduler was changed")
    return shown


def _pixels(pictures: Any, reference: Reference, n: int) -> str:
    gap = _gap(pictures[..., :: reference.stride, :: reference.stride], reference.tensors[f"images_{n}"])
    if not gap <= PIXELS:
        raise Broken(f"the picture differs from fewstep's own by {gap:.3g}, not {PIXELS:g}: weights or scheduler were changed")
    return f"{gap:.1e} from the reference"


def _again(pictures: Any, pipe: Any, facts: dict[str, Any], reference: Reference, n: int) -> str:
    if gap := _gap(draw(pipe, facts, reference, n)[1], pictures):
        raise Broken(f"two calls with one seed differ by {gap:.3g}: something draws noise that torch.manual_seed does not seed")
    return ""


def _blind(pictures: Any, folder: Path, scratch: Path, pipe: Any, facts: dict[str, Any], reference: Reference, n: int) -> str:
    """The same picture from a reader that sees neither the file's header nor its alphas."""
    strength.blind(pipe, folder, scratch, facts)
    gap = _gap(draw(pipe, facts, reference, n)[1], pictures)
    if not gap <= (SAME if facts["lora"]["reader"] == "diffusers" else PIXELS):
        raise Broken(f"a reader that ignores the LoRA's metadata draws another picture (by {gap:.3g}): alpha must equal rank")
    return ""


def main(folder: str, teacher: str, scratch: str) -> None:
    sys.meta_path.insert(0, Blocker)  # type: ignore[arg-type]
    checks = prove(Path(folder), teacher, Path(scratch))
    alone = "fewstep" not in {m.split(".")[0] for m in sys.modules}
    checks.append({"name": "without fewstep", "ok": alone, "detail": "" if alone else "it was imported; Diffusers alone must do"})
    print("\n" + json.dumps(checks))


if __name__ == "__main__":
    main(*sys.argv[1:])
