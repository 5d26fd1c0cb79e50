"""Random pipelines of stock Diffusers classes, made offline in a fraction of a second: the smallest teachers of every family."""

from collections.abc import Callable
from pathlib import Path

from diffusers import DiffusionPipeline

from tiny.flux import tiny_flux2_pipeline, tiny_flux_pipeline, tiny_klein_pipeline
from tiny.images import tiny_lumina2_pipeline, tiny_pixart_pipeline, tiny_qwen_pipeline, tiny_sana_pipeline, tiny_zimage_pipeline
from tiny.parts import tiny_vae
from tiny.stable import (
    tiny_ddpm_pipeline,
    tiny_dit_pipeline,
    tiny_sd3_pipeline,
    tiny_sd21_pipeline,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
)
from tiny.video import tiny_cogvideox_pipeline, tiny_ltx_pipeline, tiny_wan22_pipeline, tiny_wan_pipeline

# name of a family -> (its smallest pipeline, the size in pixels to use it at; None: its own)
MAKERS: dict[str, tuple[Callable[[], DiffusionPipeline], tuple[int, ...] | None]] = {
    "sd": (tiny_sd_pipeline, None),
    "sd21": (tiny_sd21_pipeline, None),
    "sdxl": (tiny_sdxl_pipeline, None),
    "sd3": (tiny_sd3_pipeline, None),
    "flux": (tiny_flux_pipeline, (64, 48)),
    "flux2": (tiny_flux2_pipeline, (64, 48)),
    "klein": (tiny_klein_pipeline, (64, 48)),
    "pixart": (tiny_pixart_pipeline, None),
    "sana": (tiny_sana_pipeline, (64, 32)),
    "lumina2": (tiny_lumina2_pipeline, None),
    "qwen": (tiny_qwen_pipeline, (64, 48)),
    "wan": (tiny_wan_pipeline, (5, 64, 48)),
    "wan22": (tiny_wan22_pipeline, (5, 64, 48)),
    "ltx": (tiny_ltx_pipeline, (9, 32, 64)),
    "cogvideox": (tiny_cogvideox_pipeline, None),
    "zimage": (tiny_zimage_pipeline, None),
    "dit": (tiny_dit_pipeline, None),
    "ddpm": (tiny_ddpm_pipeline, None),
}


class Made(dict):
    """What is made when it is first asked for."""

    def __init__(self, make):
        self.make = make

    def __missing__(self, name):
        self[name] = self.make(name)
        return self[name]


def save(pipe: DiffusionPipeline, folder: Path) -> Path:
    """Writes a pipeline as a Diffusers folder and returns it: `load_teacher(str(save(tiny_sd_pipeline(), tmp_path)))`."""
    pipe.save_pretrained(folder)
    return folder


__all__ = [
    "MAKERS",
    "Made",
    "save",
    "tiny_cogvideox_pipeline",
    "tiny_ddpm_pipeline",
    "tiny_dit_pipeline",
    "tiny_flux2_pipeline",
    "tiny_flux_pipeline",
    "tiny_klein_pipeline",
    "tiny_ltx_pipeline",
    "tiny_lumina2_pipeline",
    "tiny_pixart_pipeline",
    "tiny_qwen_pipeline",
    "tiny_sana_pipeline",
    "tiny_sd3_pipeline",
    "tiny_sd21_pipeline",
    "tiny_sd_pipeline",
    "tiny_sdxl_pipeline",
    "tiny_vae",
    "tiny_wan22_pipeline",
    "tiny_wan_pipeline",
    "tiny_zimage_pipeline",
]
