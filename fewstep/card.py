"""The model card of an export: what it is, the lines that run it, the noise levels it was trained at, how it was made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from fewstep.adapters import Teacher, teacher_folder
from fewstep.schedules import RectifiedFlow

COMFY = {"renoise": "lcm", "ddim": "euler"}  # ComfyUI's names of our samplers
PLACES = {  # where a LoRA goes that is not for Diffusers
    "comfyui": "In ComfyUI the LoRA goes into `models/loras`; load it with `LoraLoaderModelOnly`",
    "kohya": "kohya's tools (sd-scripts, musubi-tuner) load the LoRA by its path",
}
LICENSE = ("license", "license_name", "license_link")


def write(teacher: Teacher, facts: dict[str, Any], name: str) -> str:
    """README.md of the export `facts` (fewstep.json) describes, in a folder called `name`."""
    parts = [
        f"---\n{_front(teacher, facts).to_yaml()}\n---",
        f"# {name}",
        _summary(facts),
        f"## Use it\n\n{_use(facts, name)}\n\n{_hints(facts)}",
        f"## Noise levels\n\n{_levels(teacher, facts)}",
        _table(facts["record"].get("results") or {}),
        f"## How it was made\n\n```yaml\n{_made(facts)}```",
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _front(teacher: Teacher, facts: dict[str, Any]) -> ModelCardData:
    lora = facts["form"] == "lora"
    objective = (facts["record"].get("config") or {}).get("objective") or {}
    drawn = "text-to-image" if "prompt" in facts["ask"] else "unconditional-image-generation"
    kind = "text-to-video" if facts["video"] else drawn
    tags = [kind, "diffusers", *(["lora"] if lora else []), "few-step", "distillation"]
    if "name" in objective:
        tags.append(str(objective["name"]))
    extra: dict[str, Any] = _license(teacher)
    if teacher_folder(teacher.path) is None:
        extra |= {"base_model": teacher.path, "base_model_relation": "adapter" if lora else "finetune"}
    return ModelCardData(library_name="diffusers", pipeline_tag=kind, tags=tags, **extra)


def _license(teacher: Teacher) -> dict[str, str]:
    """The teacher's own licence fields; nothing where its card states none."""
    folder = teacher_folder(teacher.path)
    try:
        file = folder / "README.md" if folder else Path(hf_hub_download(teacher.path, "README.md"))
        data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):  # no card, or none that can be read
        return {}
    return {k: data[k] for k in LICENSE if data.get(k)}


def named(told: Any) -> Any:
    """A record in which files and folders of this disk go by their last name: where they lie helps nobody elsewhere."""
    if isinstance(told, dict):
        return {key: named(value) for key, value in told.items()}
    if isinstance(told, list | tuple):
        return [named(value) for value in told]
    found = re.fullmatch(r"(|.*:)/(?!/).*?([^/]+)/?", told) if isinstance(told, str) else None
    return found[1] + found[2] if found else told


def _summary(facts: dict[str, Any]) -> str:
    made = {"lora": "LoRA on", "full": "distilled copy of"}[facts["form"]]
    steps = facts["steps"]
    return (
        f"A few-step {made} `{named(facts['teacher']['path'])}` (`{facts['base_pipeline']}`), trained for {steps} "
        f"step{'s' * (steps > 1)} with the sampler `{facts['sampler']}` by fewstep {facts['fewstep']}."
    )


def _use(facts: dict[str, Any], name: str) -> str:
    """The lines that run it, where stock Diffusers reads its names."""
    if facts["form"] == "full" or facts["lora"]["reader"] != "keys":
        return f"```python\n{snippet(facts, name)}```"
    return (
        f"`{facts['lora']['file']}` is for other tools: Diffusers does not read its names (`--format diffusers` exports those)."
    )


def snippet(facts: dict[str, Any], name: str) -> str:
    """Lines that run this very export with stock Diffusers, from the folder above it."""
    call = ", ".join(f"{k}={v!r}" for k, v in (facts["ask"] | facts["call"]).items())
    run = f"drawn = pipe({call}, generator=torch.manual_seed(0))\n"
    if facts["video"]:
        run += 'from diffusers.utils import export_to_video\n\nexport_to_video(drawn.frames[0], "video.mp4")\n'
    else:
        run += 'drawn.images[0].save("image.png")\n'
    place = f"folder = {name!r}  # where this folder lies, or its hub id\n"
    base = teacher_folder(facts["teacher"]["path"]) or facts["teacher"]["path"]
    if own := facts["runs_by"]:
        path, module = f", {str(base)!r}" if facts["form"] == "lora" else "", Path(own).stem
        head = "import sys\n\nimport torch\n\n" + place.replace(", or its hub id", "")
        return f"{head}sys.path.insert(0, folder)\nimport {module}\n\npipe = {module}.load(folder{path})\n{run}"
    if facts["form"] == "full":
        head = "import torch\nfrom diffusers import DiffusionPipeline\n\n"
        return f"{head}{place}pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)\n{run}"
    scheduler, lora, net = facts["scheduler"], facts["lora"], f"pipe.{facts['components'][0]}"
    kind = "DiffusionPipeline" if facts["pipeline"] == facts["base_pipeline"] else facts["pipeline"]
    loads = f"pipe.load_lora_weights(folder, weight_name={lora['file']!r})\n"
    for name, other in lora["others"].items():
        loads += f"pipe.load_lora_weights(folder, weight_name={other['file']!r}, load_into_{name}=True)\n"
    if lora["reader"] == "peft":
        loads = f"{net} = PeftModel.from_pretrained({net}, folder).merge_and_unload()\n"
    head = f"import torch\nfrom diffusers import {', '.join(sorted({kind, scheduler}))}\n"
    head += "from peft import PeftModel\n" if lora["reader"] == "peft" else ""
    return (
        f"{head}\n{place}"
        f"pipe = {kind}.from_pretrained({str(base)!r}, dtype=torch.float32)\n{loads}"
        f'pipe.scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")\n{run}'
    )


def _hints(facts: dict[str, Any]) -> str:
    lines = ["The scheduler saved here gives the times the student was trained at; another one gives other times."]
    scale = next((f"{k}={v!r}" for k, v in facts["call"].items() if k.endswith(("guidance_scale", "cfg_scale"))), "")
    if told := facts.get("scales"):
        trained = "" if told["range"] is None else ", trained at scales from {:g} to {:g}".format(*told["range"])
        if told["folded"]:
            lines.append(
                f"Guidance of {told['at']:g} is in these weights{trained}; `{scale}` adds none. Export again for another scale."
            )
        else:
            lines.append(f"`{scale}` is an input of the network{trained}: others in that range draw, too. Proved at this one.")
    elif facts["embedded"]:
        lines.append(f"`{scale}` is an input of the network: the student was trained with this very value.")
    elif scale:
        lines.append(f"`{scale}` is no guidance: the student was trained to need none.")
    if "sigmas" in facts["call"]:
        lines.append("`sigmas` are 1 - i / n for i from 0 in n steps; without them the scheduler would waste the last one.")
    if facts["sampler"] == "renoise" and facts["steps"] > 1:
        lines.append("Noise is drawn between steps, too: seed it as above, since some pipelines hand on no other generator.")
    if "experts" in facts:
        begins = ", ".join(f"{time:.6g}" for time in facts["experts"]["switches"])
        number = len(facts["experts"]["files"])
        lines.append(f"`phased.py`, in this folder, hands over between {number} experts; the next ones begin at {begins}.")
    if "ends" in facts:
        lines.append(
            "`told.py`, in this folder, tells the network where each step ends; stock Diffusers alone is right in one step."
        )
    if list(facts["times"]) == ["1"]:
        lines.append("It draws in one step alone: in more it was neither trained nor proved.")
    if facts["form"] == "lora":
        lines += [f"{PLACES[layout]}." for layout in PLACES if layout == facts["lora"]["layout"]]
        lines.append("The LoRA's alpha equals its rank: strength 1.0 is right in every reader.")
    lines.append("`fewstep verify` on this folder proves all of it in a fresh process.")
    return "\n".join(f"- {line}" for line in lines)


def _levels(teacher: Teacher, facts: dict[str, Any]) -> str:
    """The times the network sees and the sigmas to paste where only those can be given (ComfyUI's ManualSigmas)."""
    flow = isinstance(teacher.schedule, RectifiedFlow)
    rows = ["| steps | times the network sees | sigmas |", "| --- | --- | --- |"]
    for n, times in facts["times"].items():
        t = teacher.schedule.t_of_model_time(torch.tensor(times, dtype=torch.float64))
        alpha, sigma = teacher.schedule.alpha_sigma(t)
        sigmas = [*(sigma if flow else sigma / alpha).tolist(), 0.0]
        rows.append(f"| {n} | {', '.join(f'{v:.6g}' for v in times)} | {', '.join(f'{v:.6g}' for v in sigmas)} |")
    table = "\n".join(rows)
    if facts["runs_by"]:
        return table
    if teacher.first is not None:
        return f"{table}\n\nThe first one is handed pure noise; ComfyUI would hand it less, and is not right for this student."
    comfy = COMFY.get(facts["sampler"], facts["sampler"])
    return f"{table}\n\nIn ComfyUI: sampler `{comfy}` with these sigmas (`ManualSigmas`), cfg 1."


def _table(results: dict[str, Any]) -> str:
    """Measured rows as a table, numbers to four digits, below what they were measured by."""
    if not (rows := results.get("rows")):
        return ""
    protocol = results["protocol"]
    said = ", ".join(f"{key} `{protocol[key]}`" for key in ("name", "hash", "extractor", "reference", "n") if key in protocol)
    told = f"Protocol: {said}. `fd` is a distance in the features of that extractor; rows compare where hashes agree."
    columns = list(dict.fromkeys(k for row in rows for k in row))
    show = lambda v: "" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v)  # noqa: E731
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(show(row.get(c)) for c in columns) + " |" for row in rows]
    return f"## Measured\n\n{told}\n\n" + "\n".join(lines)


def _made(facts: dict[str, Any]) -> str:
    kept = {k: facts[k] for k in ("fewstep", "git", "teacher", "form", "sampler", "steps")}
    record = {k: v for k, v in facts["record"].items() if k != "results"}
    return yaml.safe_dump(json.loads(json.dumps(named({**kept, **record}))), sort_keys=False, allow_unicode=True)
