"""LoRAs by their matrices alone, and by the readers that people use. Runs beside `proof.py`, without fewstep.

`lora` is the entry of that name in fewstep.json: "file"; "a" and "b", how names end; "where", module -> [stem of its names, first
row, rows] (layouts that have one layer for several modules stack them); "reader", who loads the file: "diffusers", "peft", or
"keys" where neither does (ComfyUI and kohya's tools do).
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


def attach(pipe: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Puts the LoRA of an export on the pipeline of its teacher, by the reader it is meant for."""
    lora, net = facts["lora"], getattr(pipe, facts["component"])
    if lora["reader"] == "diffusers":
        pipe.load_lora_weights(folder, weight_name=lora["file"])
    elif lora["reader"] == "peft":
        from peft import PeftModel

        PeftModel.from_pretrained(net, folder)  # puts the adapter into the network itself
    else:
        merge(net, folder / lora["file"], lora)


@torch.no_grad()
def check(folder: Path, facts: dict[str, Any], pipe: Any) -> str:
    """Every pair of the file sits on its layer and adds exactly B A: scale 1, whatever the reader makes of alpha.

    Returns what was found. Raises Broken."""
    lora = facts["lora"]
    if lora["reader"] == "keys":  # the names' own readers are not here: what they read is checked, and merged by `attach`
        return f"{sum(1 for _ in deltas(folder / lora['file'], lora))} layers, by their matrices"
    layers = {n: m for n, m in getattr(pipe, facts["component"]).named_modules() if getattr(m, "lora_A", None)}
    made = sorted({adapter for module in layers.values() for adapter in module.lora_A})
    files = facts.get("experts", {}).get("files") or dict.fromkeys(made[:1], lora["file"])
    if made != sorted(files):
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
    return f"{count} layers"


def blind(pipe: Any, folder: Path, scratch: Path, facts: dict[str, Any]) -> None:
    """Takes the LoRA off the pipeline and puts it on again as a reader does that sees neither its header nor its alphas."""
    from safetensors.torch import load_file, save_file

    lora, net = facts["lora"], getattr(pipe, facts["component"])
    file = folder / lora["file"]
    if lora["reader"] == "diffusers":
        save_file({k: v for k, v in load_file(file).items() if not k.endswith(".alpha")}, scratch / file.name)
        pipe.unload_lora_weights()
        pipe.load_lora_weights(scratch, weight_name=file.name)
        return
    for layer in net.modules():
        if getattr(layer, "lora_A", None):
            layer.enable_adapters(False)
    merge(net, file, lora)
