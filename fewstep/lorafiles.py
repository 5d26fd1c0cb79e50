"""A LoRA on disk: which form and layout an export takes, and the files of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from fewstep import loraformat, mixture
from fewstep.adapters import Teacher
from fewstep.loraformat import Naming
from fewstep.networks import Full, Lora

PEFT_FILE = "adapter_model.safetensors"  # beside adapter_config.json


def choose(teacher: Teacher, kind: Full | Lora, form: str | None, layout: str | None, phases: int) -> tuple[str, Naming | None]:
    """(form, names of the LoRA's keys or None) of what was asked; None asks for what the student is, and stock code loads.

    Raises ValueError where they do not go together."""
    pipeline, loads = type(teacher.pipe).__name__, teacher.family.lora_loader
    if form is None:
        form = "lora" if isinstance(kind, Lora) and (loads or phases == 1) else "full"
    if form not in ("lora", "full"):
        raise ValueError(f"an export is 'lora' or 'full', not {form!r}")
    if form == "full":
        if layout is not None:
            raise ValueError(
                f"the layout {layout!r} names a LoRA's keys, a full export has none; leave the layout away or take form='lora'"
            )
        return form, None
    if isinstance(kind, Full):
        raise ValueError("this student was trained as full weights and has no LoRA; export it with form='full'")
    network, layout = type(getattr(teacher.pipe, teacher.components[0])).__name__, layout or ("diffusers" if loads else "peft")
    names = loraformat.naming(layout, network, teacher.family.component)
    if names.layout == "diffusers" and not loads:
        raise ValueError(
            f"{pipeline} has no LoRA loader; export with layout='peft', or with form='full', which merges the adapter"
        )
    if len(teacher.components) > 1 and names.reader == "peft":
        raise ValueError(f"a PEFT folder holds one network's LoRA and {pipeline} has two here; export with layout='diffusers'")
    if phases > 1 and names.reader != "diffusers":
        raise ValueError(
            f"a student of {phases} experts runs by {mixture.PIPELINE}, which does not read the layout {names.layout!r}; "
            "export it with " + ("layout='diffusers'" if loads else "form='full'")
        )
    if teacher.first is not None and names.layout not in ("diffusers", "peft"):
        raise ValueError(
            f"{names.layout} is for tools that hand a network as much noise as its time says, and this student takes pure noise "
            f"at {teacher.first}; export it for Diffusers"
        )
    return form, names


def files(names: Naming, phases: int, components: Sequence[str]) -> dict[str, str]:
    """The file of each adapter."""
    return {"default": PEFT_FILE} if names.layout == "peft" else mixture.lora_files(phases, components)


def write(teacher: Teacher, folded: dict[str, Tensor], names: Naming, to: Path, file: str) -> None:
    """One file of alpha == rank. The Diffusers layout goes through the pipeline's own writer, with adapter metadata; the PEFT
    layout has its config beside it."""
    r = loraformat.rank(folded)
    config = LoraConfig(r=r, lora_alpha=r, target_modules=loraformat.modules(folded))
    if names.layout == "diffusers":
        component = teacher.family.component
        metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
        layers = {f"{component}_lora_layers": folded, f"{component}_lora_adapter_metadata": metadata}
        type(teacher.pipe).save_lora_weights(to, weight_name=file, **layers)
        return
    # Stock readers refuse other names together with adapter metadata: alpha == rank says it all.
    save_file(loraformat.spell(folded, names), to / file, metadata={"format": "pt"})
    if names.layout == "peft":
        config.inference_mode = True
        config.base_model_name_or_path = teacher.path
        config.save_pretrained(str(to))


def facts(
    adapters: Sequence[dict[str, Tensor]], names: Naming, files: Sequence[str], components: Sequence[str]
) -> dict[str, Any]:
    """The entry "lora" of fewstep.json; see `strength.py`."""
    first, *others = (_facts(own, names, file) for own, file in zip(adapters, files, strict=True))
    return {**first, "others": dict(zip(components[1:], others, strict=False))}


def _facts(folded: dict[str, Tensor], names: Naming, file: str) -> dict[str, Any]:
    return {
        "file": file,
        "layout": names.layout,
        "reader": names.reader,
        "rank": loraformat.rank(folded),
        "a": names.a,
        "b": names.b,
        "where": loraformat.where(folded, names),
    }
