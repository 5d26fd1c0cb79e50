"""Draws pictures with an exported few-step student: `python samplers/generate.py EXPORT --prompt TEXT [--base TEACHER]`.

Imports Diffusers and nothing of fewstep: this is what a deployer copies. EXPORT is what `fewstep export` wrote; a LoRA needs its
teacher's pipeline as --base (a folder or a hub id), a full export does not. What no stock pipeline draws has one of its own, such
as told.py, which must lie beside this file: of an export itself, no code is run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import diffusers
import torch


def load(export: Path, base: str | None) -> Any:
    """The pipeline of an export, its own scheduler in place. Raises SystemExit with a sentence where something is missing."""
    facts = json.loads((export / "fewstep.json").read_text())
    lora = facts.get("lora")
    if lora and base is None:
        raise SystemExit(f"{export} is a LoRA of {facts['teacher']['path']}; name that pipeline's folder or hub id with --base")
    if facts["runs_by"]:
        return beside(facts["runs_by"], export).load(export, *([base] if lora else []))
    if not lora:
        return diffusers.DiffusionPipeline.from_pretrained(export, use_safetensors=True)
    pipe = getattr(diffusers, facts["pipeline"]).from_pretrained(base, use_safetensors=True)
    rules = json.loads((export / "scheduler" / "scheduler_config.json").read_text())
    pipe.scheduler = getattr(diffusers, rules["_class_name"]).from_config(rules)
    if lora["reader"] == "keys":
        raise SystemExit(f"{export} is a LoRA in the layout {lora['layout']}, which Diffusers does not read")
    if lora["reader"] == "peft":
        from peft import PeftModel

        net = getattr(pipe, facts["components"][0])
        setattr(pipe, facts["components"][0], PeftModel.from_pretrained(net, export).merge_and_unload())
    else:
        pipe.load_lora_weights(export, weight_name=lora["file"])
        for name, other in lora["others"].items():  # of pipelines with two networks, as Wan 2.2
            pipe.load_lora_weights(export, weight_name=other["file"], **{f"load_into_{name}": True})
    return pipe


def beside(pipeline: str, export: Path) -> Any:
    """The module of a pipeline that lies beside this file."""
    file = Path(__file__).with_name(pipeline)
    if not file.exists():
        raise SystemExit(f"{export} is drawn by {pipeline}, which lies in it: read it, and copy it beside {Path(__file__).name}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--prompt", action="append", required=True)
    parser.add_argument("--base")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    args = parser.parse_args()
    facts = json.loads((args.export / "fewstep.json").read_text())
    if args.steps is not None and args.steps < 1:
        raise SystemExit(f"nothing can be drawn in {args.steps} steps; give at least 1, or leave --steps away")
    if args.steps and args.steps > 1 and list(facts["times"]) == ["1"]:
        raise SystemExit(f"{args.export} draws in one step alone, not in {args.steps}; leave --steps away")
    pipe = load(args.export, args.base)
    call = facts["call"] | ({"num_inference_steps": args.steps} if args.steps else {})
    if "sigmas" in call:
        call["sigmas"] = [1 - i / call["num_inference_steps"] for i in range(call["num_inference_steps"])]
    # Torch's own generator: some pipelines hand their scheduler none, and it draws from that one.
    pictures = pipe(prompt=args.prompt, generator=torch.manual_seed(args.seed), **call).images
    args.out.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.save(args.out / f"{i:03d}.png")
    print(f"{len(pictures)} pictures in {args.out}")


if __name__ == "__main__":
    main()
