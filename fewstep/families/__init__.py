"""The table of Diffusers families: one entry of about 25 lines a pipeline class."""

from __future__ import annotations

from fewstep.families import attention, classes, flux, flux2, pixels, stable_diffusion, video
from fewstep.families.base import Family, Setting, bare, make_scheduler, net_config, setting_of

__all__ = ["FAMILIES", "Family", "Setting", "bare", "family_of", "make_scheduler", "net_config", "setting_of"]

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": stable_diffusion.SD,
    "StableDiffusionXLPipeline": stable_diffusion.SDXL,
    "StableDiffusion3Pipeline": stable_diffusion.SD3,
    "FluxPipeline": flux.FLUX,
    "Flux2Pipeline": flux2.FLUX2,
    "Flux2KleinPipeline": flux2.KLEIN,
    "QwenImagePipeline": flux.QWEN,
    "ZImagePipeline": flux.ZIMAGE,
    "PixArtSigmaPipeline": attention.PIXART,
    "SanaPipeline": attention.SANA,
    "Lumina2Pipeline": attention.LUMINA2,
    "WanPipeline": video.WAN,
    "LTXPipeline": video.LTX,
    "CogVideoXPipeline": video.COGVIDEOX,
    "DiTPipeline": classes.DIT,
    "DDPMPipeline": pixels.DDPM,
    "DDIMPipeline": pixels.DDPM,
}

# Classes that people try, and what they want instead.
_INSTEAD = {
    "StableDiffusionXLImg2ImgPipeline": (
        "it is the SDXL refiner (or another image-to-image pipeline), which starts from a picture and not from noise; "
        "distil the base model, StableDiffusionXLPipeline"
    ),
}


def family_of(name: str) -> Family:
    """The entry of a pipeline class. Raises ValueError with the remedy for one that is not known."""
    if name in _INSTEAD:
        raise ValueError(f"{name} cannot be distilled: {_INSTEAD[name]}")
    if name not in FAMILIES:
        raise ValueError(
            f"{name} is not a family fewstep knows ({', '.join(sorted(FAMILIES))}); to add it, write an entry of about 25 lines "
            "in fewstep/families/ and its tiny pipeline in tests/tiny (CONTRIBUTING.md, 'Add a family')"
        )
    return FAMILIES[name]
