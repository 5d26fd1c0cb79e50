"""LoRAs by their matrices alone, and by the readers that people use. Runs beside `proof.py`, without fewstep.

`lora` is the entry of that name in fewstep.json: "file"; "a" and "b", how names end; "where", module -> [stem of its names, first
row, rows] (layouts that have one layer for several modules stack them); "reader", who loads the file: "diffusers", "peft", or
"keys" where neither does (ComfyUI and kohya's tools do); "others", such an entry for each further network of a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAME = 1e-6  # largest difference of weights whose largest is below 1


class Broken(Exception):
    """A check that failed, as a sentence."""


def deltas(file: Path, lora: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(module, B A as a matrix) of each module, as a reader sees it that knows neither header nor alpha.

    Raises Broken where the file has a weight of no module, or an alpha that is not the rank."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        left = set(opened.keys())
        for module, (stem, first, rows) in lora["where"].items():
            if missing := {stem + lora["a"], stem + lora["b"]} - set(opened.keys()):
                raise Broken(f"{file.name} has no {min(missing)}, the LoRA of {module}")
            a, b = opened.get_tensor(stem + lora["a"]), opened.get_tensor(stem + lora["b"])
            stated = float(opened.get_tensor(stem + ".alpha")) if stem + ".alpha" in left else len(a)
            if stated != len(a):
                raise Broken(f"the alpha of {module} is {stated:g} at rank {len(a)}; alpha must equal rank")
            left -= {stem + lora["a"], stem + lora["b"], stem + ".alpha"}
            yield module, b.flatten(1)[first : first + rows] @ a.flatten(1)
    if left:
        raise Broken(f"the reader ignored {len(left)} weights of {file.name} (first: {min(left)})")


@torch.no_grad()
def merge(net: Any, file: Path, lora: dict[str, Any]) -> None:
    """Adds a LoRA into a network's weights by its matrices alone."""
    for module, added in deltas(file, lora):
        layer = net.get_submodule(module)
        weight = getattr(layer, "base_layer", layer).weight
        weight += added.reshape(weight.shape)


def each(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entry of each network that has a LoRA, by its name in the pipeline."""
    return {facts["components"][0]: facts["lora"], **facts["lora"]["others"]}


def attach(pipe: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Puts the LoRA of an export on the pipeline of its teacher, by the reader it is meant for."""
    for name, lora in each(facts).items():
        if lora["reader"] == "diffusers":
            _load(pipe, folder, name, lora, facts)
        elif lora["reader"] == "peft":
            from peft import PeftModel

            PeftModel.from_pretrained(getattr(pipe, name), folder)  # puts the adapter into the network itself
        else:
            merge(getattr(pipe, name), folder / lora["file"], lora)


def _load(pipe: Any, folder: Path, name: str, lora: dict[str, Any], facts: dict[str, Any]) -> None:
    """By Diffusers, which is told where a LoRA belongs if that is not the pipeline's first network."""
    place = {} if name == facts["components"][0] else {f"load_into_{name}": True}
    pipe.load_lora_weights(folder, weight_name=lora["file"], **place)


def check(folder: Path, facts: dict[str, Any], pipe: Any) -> str:
    """Every pair of the file sits on its layer and adds exactly B A: scale 1, whatever the reader makes of alpha.

    Returns what was found. Raises Broken."""
    found = each(facts)
    if facts["lora"]["reader"] == "keys":  # the names' readers are not here: what they read is checked, and merged by `attach`
        return f"{sum(1 for lora in found.values() for _ in deltas(folder / lora['file'], lora))} layers, by their matrices"
    experts = facts.get("experts", {}).get("files")
    return f"{sum(_sits(folder, getattr(pipe, name), lora, experts) for name, lora in found.items())} layers"


@torch.no_grad()
def _sits(folder: Path, net: Any, lora: dict[str, Any], experts: dict[str, str] | None) -> int:
    """How many layers of a network have the LoRA of an entry, or those of its experts' files by adapter."""
    layers = {n: m for n, m in net.named_modules() if getattr(m, "lora_A", None)}
    made = sorted({adapter for module in layers.values() for adapter in module.lora_A})
    files = experts or dict.fromkeys(made[:1], lora["file"])
    if not made or made != sorted(files):
        raise Broken(f"the reader made the adapters {', '.join(made) or 'none'}, not one for each file")
    count, worst = 0, 0.0
    for adapter, file in files.items():
        adapted = {name for name, module in layers.items() if adapter in module.lora_A}
        for name, wanted in deltas(folder / file, lora):
            if name not in adapted:
                raise Broken(f"the reader ignored the LoRA of {name} in {file}")
            added = layers[name].get_delta_weight(adapter)
            gap = float((added.flatten(1) - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
            count, worst = count + 1, max(worst, gap)
        if more := sorted(adapted - lora["where"].keys()):
            raise Broken(f"the reader made a LoRA on {more[0]}, of which {file} says nothing")
    if not worst <= SAME:
        raise Broken(f"the reader applies the LoRA at another strength (weights differ by {worst:.3g}); alpha must equal rank")
    return count


def blind(pipe: Any, folder: Path, scratch: Path, facts: dict[str, Any]) -> None:
    """Takes the LoRA off the pipeline and puts it on again as a reader does that sees neither its header nor its alphas."""
    from safetensors.torch import load_file, save_file

    found = each(facts)
    if facts["lora"]["reader"] == "diffusers":
        pipe.unload_lora_weights()
        for name, lora in found.items():
            kept = {k: v for k, v in load_file(folder / lora["file"]).items() if not k.endswith(".alpha")}
            save_file(kept, scratch / lora["file"])
            _load(pipe, scratch, name, lora, facts)
        return
    for name, lora in found.items():
        for layer in getattr(pipe, name).modules():
            if getattr(layer, "lora_A", None):
                layer.enable_adapters(False)
        merge(getattr(pipe, name), folder / lora["file"], lora)
