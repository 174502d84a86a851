"""How close a low-bit network came, as a traffic light: by the best evidence that there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..evaluation.agreement import REFERENCE_SCORE
from ..models.detecting import Task
from ..runs.comparison import number

Light = Literal["green", "amber", "red", "grey"]

AP_BOUNDS = (0.97, 0.90)
"""Share of the float network's AP that is green, and that is still amber."""

KEPT_BOUNDS = (0.90, 0.75)
"""The same of the share of its detections above a score that this network has above that score too:
some that are just above it fall below it in any case."""

FEWEST = 20
"""Of fewer detections, shares say nothing."""

_WORDS: dict[Light, str] = {
    "green": "Close to the float network",
    "amber": "Look closer before you use it",
    "red": "Far from the float network",
    "grey": "Not known how close it is",
}

_RULE = (
    f"Green: at least {AP_BOUNDS[0]:.0%} of the float network's {{metric}} or, where none was "
    f"measured, {KEPT_BOUNDS[0]:.0%} of {{kept}}; amber: at least {AP_BOUNDS[1]:.0%} or "
    f"{KEPT_BOUNDS[1]:.0%}; red: less. Measured {{metric}} counts before photos, photos before "
    "synthetic images. Synthetic images alone give no more than amber where the network was made "
    "on them, or where they are not like those that the network was trained on."
)

_WORDING: Mapping[Task, dict[str, str]] = {
    "detection": {
        "metric": "AP",
        "kept": f"its detections above a score of {REFERENCE_SCORE}, above it again",
        "reached": "AP",
        "nothing": f"images in which the float network has {FEWEST} detections or more",
    },
    "classification": {
        "metric": "top-1 accuracy",
        "kept": "the images in its likeliest category",
        "reached": "a top-1 accuracy of",
        "nothing": f"{FEWEST} images or more",
    },
}


def rule_of(task: Task) -> str:
    """How runs of networks of a task are judged."""
    return _RULE.format(**_WORDING[task])


@dataclass(frozen=True)
class Verdict:
    """What to think of a run.

    Attributes:
        light: its colour.
        word: it in a few words.
        why: the figure it follows from, and what this figure does not tell.
    """

    light: Light
    word: str
    why: str


def verdict_of(
    metrics: Mapping[str, Any],
    AP: tuple[float | None, float | None],
    task: Task = "detection",
) -> Verdict:
    """The verdict on a run.

    Args:
        metrics: the run's.
        AP: of the float and of the low-bit network, where measured; of classifiers, top-1 accuracy.
        task: of the network.
    """
    before, after = AP
    if before and after is not None:
        return _of(
            _light(after / before, AP_BOUNDS),
            f"It reaches {_WORDING[task]['reached']} {after:.3f}, and the float network "
            f"{before:.3f}: {after / before:.1%} of it, measured against labels.",
        )
    closeness = metrics.get("closeness")
    closeness = closeness if isinstance(closeness, Mapping) else {}
    for where, images in (("photos", "real photos"), ("synthetic", "synthetic images")):
        values = closeness.get(where)
        names = ("images", "same") if task == "classification" else ("objects", "kept_above")
        objects, kept = (number(values, name) for name in names)
        if objects is None or kept is None or objects < FEWEST:
            continue
        kept_of = (
            f"it has {kept:.0f} of the float network's {objects:.0f} detections above a score of "
            f"{REFERENCE_SCORE} above that score too"
        )
        if task == "classification":
            kept_of = f"in {kept:.0f} of {objects:.0f} it finds the float network's category"
        light = _light(kept / objects, KEPT_BOUNDS)
        if where == "photos":
            why = f"On {images} that it was made without, {kept_of}."
            return _of(light, f"{why} Accuracy against labels was not measured.")
        held_out = isinstance(values, Mapping) and values.get("held_out") is True
        quality = metrics.get("set_quality")
        warned = isinstance(quality, Mapping) and bool(quality.get("warnings"))
        provenance = "that it was made without" if held_out else "that it was made on"
        why = f"On {images if held_out else 'images'} {provenance}, {kept_of}"
        if warned:
            why += "; these images are not like those that the network was trained on"
        if light == "green" and (warned or not held_out):
            light = "amber"
        return _of(light, f"{why}. How close it is on other images was not measured.")
    return _of(
        "grey",
        f"Nothing was measured on {_WORDING[task]['nothing']}. Try it on photos: dfq eval "
        "--against FLOAT --data PHOTOS.",
    )


def _light(share: float, bounds: tuple[float, float]) -> Light:
    if share >= bounds[0]:
        return "green"
    return "amber" if share >= bounds[1] else "red"


def _of(light: Light, why: str) -> Verdict:
    return Verdict(light, _WORDS[light], why)
