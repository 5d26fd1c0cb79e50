"""Settings that no loss can be made of are refused where a config is read, in sentences that all objectives share."""

from __future__ import annotations


def at_least(least: float, **settings: float | None) -> None:
    """Raises ValueError for the first setting below `least`; None is a setting that is not used."""
    for name, value in settings.items():
        if value is not None and not value >= least:  # so that nan is refused, too
            raise ValueError(f"{name} must be at least {least:g}, not {value}")


def positive(**settings: float | None) -> None:
    """Raises ValueError for the first setting that is not above 0; None is a setting that is not used."""
    for name, value in settings.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, not {value}")


def share(**settings: float | None) -> None:
    """Raises ValueError for the first setting outside [0, 1]; None is a setting that is not used."""
    for name, value in settings.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} is a share between 0 and 1, not {value}")


def part(of: str, **settings: float | None) -> None:
    """Raises ValueError for the first setting outside [0, 1): a share `of` something that must leave some over; None is a
    setting that is not used."""
    for name, value in settings.items():
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name} is a share of {of} in [0, 1), not {value}")


def check_scales(guidance: tuple[float, float] | None) -> None:
    """Raises ValueError for a range of guidance scales that is none."""
    if guidance is not None and not 0 <= guidance[0] <= guidance[1]:
        raise ValueError(f"guidance is a range of scales, [lowest, highest], not {list(guidance)}; 1 is no guidance")


def check_fed(scales: tuple[float, float] | None, at: float, *, embedded: bool, mixes: bool = False) -> None:
    """Raises ValueError for a student that is trained at a range of scales and would draw `at` one outside it, or whose teacher
    is fed a scale of its own (embedded), so that there are no two predictions to mix."""
    if mixes and embedded:
        raise ValueError("objective: kappas mix two predictions, but this teacher is fed its scale; leave them away")
    if scales is None:
        return
    if embedded:
        raise ValueError("objective.guidance: this teacher is fed its scale already, and would be guided twice; leave it away")
    if not scales[0] <= at <= scales[1]:
        raise ValueError(
            f"teacher.guidance: the student would draw at this scale, {at:g}, but objective.guidance has it trained at "
            f"{scales[0]:g} to {scales[1]:g} only; change one of them"
        )
