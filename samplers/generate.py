"""Draws pictures with an exported few-step student: `python samplers/generate.py EXPORT --prompt TEXT [--base TEACHER]`.

Imports Diffusers and nothing of fewstep: this is what a deployer copies. EXPORT is what `fewstep export` wrote; a LoRA needs its
teacher's pipeline as --base (a folder or a hub id), a full export does not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import diffusers
import torch


def load(export: Path, base: str | None) -> diffusers.DiffusionPipeline:
    """The pipeline of an export, its own scheduler in place. Raises SystemExit with a sentence where the base is missing."""
    facts = json.loads((export / "fewstep.json").read_text())
    if "experts" in facts:
        raise SystemExit(
            f"{export} has several experts; run the pipeline that lies in it: python {export / 'phased.py'} {export}"
        )
    if facts["form"] == "full":
        return diffusers.DiffusionPipeline.from_pretrained(export, use_safetensors=True)
    if base is None:
        raise SystemExit(f"{export} is a LoRA of {facts['teacher']['path']}; name that pipeline's folder or hub id with --base")
    pipe = getattr(diffusers, facts["pipeline"]).from_pretrained(base, use_safetensors=True)
    rules = json.loads((export / "scheduler" / "scheduler_config.json").read_text())
    pipe.scheduler = getattr(diffusers, rules["_class_name"]).from_config(rules)
    lora = facts["lora"]
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
