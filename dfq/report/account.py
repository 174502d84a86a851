"""What was done, in words: of which network, from what images, by which commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.calibration_set import CalibrationSet
from ..runs.comparison import number
from ..runs.inputs import joining
from ..runtime.label_sets import label_set
from .formats import text
from .material import SYNTHESIS, Material
from .tasks import PAGES

RUN = "RUN"
"""What commands on the page call the run's folder, whose name is another for everybody."""


def is_made_on_real(material: Material) -> bool:
    """Whether the run was made on a real set."""
    if material.data is not None:
        return not isinstance(material.data, CalibrationSet)
    identity = material.manifest.get("identity")
    data = identity.get("data") if isinstance(identity, Mapping) else None
    # Of a calibration set there are checksums.
    return isinstance(data, list) and len(data) == 2 and isinstance(data[1], int)


def joined_photos(material: Material) -> int:
    """How many real photos joined calibration."""
    identity = material.manifest.get("identity")
    photos = identity.get("photos") if isinstance(identity, Mapping) else None
    if not isinstance(photos, list) or len(photos) != 2:
        return 0
    count = photos[1]
    return len(joining(count)) if type(count) is int and 0 < count < 1 << 31 else 0


def network_name(material: Material) -> str:
    """What the network is called, in short."""
    source = material.recipe.model or str(material.student.spec().get("source") or "")
    last = source.rpartition("@")[0] or source
    return text(Path(last).stem or material.student.family, 60)


def bits_in_words(metrics: Mapping[str, Any]) -> str:
    """Bits of weights and activations."""
    weights, activations = number(metrics, "weight_bits"), number(metrics, "activation_bits")
    if weights is None or activations is None:
        return "low-bit weights and activations"
    words = f"{weights:.0f}-bit weights and {activations:.0f}-bit activations"
    return words + (", spread over the layers by a budget" if "mixed" in metrics else "")


def _settings_of_set(material: Material) -> Mapping[str, Any] | None:
    """The settings that a synthetic set was made by: its own, where it is there; those of the run,
    where the run made it; None where they are not known."""
    if isinstance(material.data, CalibrationSet):
        settings = material.data.manifest["determinants"].get("synthesis")
        return settings if isinstance(settings, Mapping) else None
    return material.recipe.synthesis.model_dump() if material.origin == SYNTHESIS else None


def is_noise(material: Material) -> bool:
    """Whether the run's set is noise, which no optimisation has changed."""
    settings = _settings_of_set(material)
    return settings is not None and settings.get("iterations") == 0


def _labels_of_set(material: Material) -> str:
    """Where the labels of a synthetic set are from."""
    settings = _settings_of_set(material)
    if settings is None:
        return "where its labels are from is not known, as the set is gone"
    labels = str(settings.get("labels"))
    named = label_set(labels)
    if named is not None:
        if named[0] == "real":
            return "its labels were taken from a real set"
        return "its labels are random, as frequent and as large as those of a real set"
    if labels == "none":
        return "without labels"
    if labels == "class":
        return "its categories were drawn, each as often"
    return "its labels are the network's own" if labels == "adaptive" else "its labels are random"


def _is_selected_on_real(material: Material) -> bool:
    recipe = material.recipe
    return recipe.method != "ptq" and recipe.distillation.select_on is not None


def what_was_real(material: Material) -> str:
    """Whether anything real had a part in making the network, in a sentence."""
    if is_made_on_real(material) or joined_photos(material) or _is_selected_on_real(material):
        return "Real images had a part in it."
    settings = _settings_of_set(material)
    if settings is None:
        return "No real image was used to make it, as far as this run goes."
    if label_set(str(settings.get("labels"))) is not None:
        return "No real image was used to make it, but the labels of a real set were."
    return "No real image was used to make it."


def sentence(material: Material) -> str:
    """What was done, in a sentence or two."""
    metrics = material.metrics
    trained = str(metrics.get("selected")).startswith("qat")
    how = "trained" if trained else "calibrated and rounded, not trained,"
    count = number(metrics, "images")
    many = "" if count is None else f"{count:.0f} "
    on = f"a set of {many}images made out of the float network itself"
    if is_made_on_real(material):
        on = f"a set of {many}real images"
    elif is_noise(material):
        on = f"a set of {many}images of noise"
    kinds = len(material.student.names)
    return (
        f"The {PAGES[material.student.task].noun} {network_name(material)} ({kinds} "
        f"{'category' if kinds == 1 else 'categories'}) with {bits_in_words(metrics)}, {how} on "
        f"{on}. {what_was_real(material)}"
    )


def real_images(material: Material) -> list[tuple[str, str]]:
    """Where real images had a part, and where they had none: (what for, what)."""
    count = f"{number(material.metrics, 'images') or 0:.0f}"
    if is_made_on_real(material):
        made_on = f"{count} real images: {text(material.origin)}"
    else:
        kind = "images of noise" if is_noise(material) else "synthetic images"
        made_on = f"none: {count} {kind}; {_labels_of_set(material)}"
    joined, metric = joined_photos(material), PAGES[material.student.task].metric
    select_on = material.recipe.distillation.select_on if _is_selected_on_real(material) else None
    rows = [
        ("Calibration and training", made_on),
        ("Photos that joined calibration", f"{joined}" if joined else "none"),
        ("Choice of the epoch", f"{metric} on {text(select_on)}" if select_on else "none"),
    ]
    closeness = material.metrics.get("closeness")
    photos = closeness.get("photos") if isinstance(closeness, Mapping) else None
    if isinstance(photos, Mapping):
        some = f"{number(photos, 'images') or 0:.0f} of {text(photos.get('data'))}"
        rows.append(("Measured on photos, without labels", some))
    measured = material.metrics.get("evaluation")
    if isinstance(measured, Mapping):
        rows.append(("Measured against labels", text(measured.get("data"))))
    if material.comparison is not None:
        rows.append(("Measured against labels", f"{material.comparison.data} (after the run)"))
    return rows


def set_name(material: Material) -> str | None:
    """What names the set of the run; None where that is not known."""
    if isinstance(material.data, CalibrationSet):
        return str(material.data.root)
    return None if material.origin == SYNTHESIS else material.origin


def commands(material: Material) -> list[tuple[str, str]]:
    """What repeats the run and its figures: (what, command)."""
    recipe, model = f"{RUN}/recipe.yaml", material.recipe.model or "MODEL"
    name = set_name(material)
    rows = []
    if not is_made_on_real(material):
        rows.append(
            ("the synthetic set", _line("synthesize", model=model, recipe=recipe, out=name))
        )
    identity = material.manifest.get("identity")
    photos = identity.get("photos") if isinstance(identity, Mapping) else None
    photos = str(photos[0]) if isinstance(photos, list) and photos else None
    rows.append(
        (
            "the run, and all that metrics.json says",
            _line("qat", recipe=recipe, model=model, data=name, photos=photos, out="ANOTHER"),
        )
    )
    rows.append(("the layers", _line("inspect", model=RUN)))
    if name is not None:
        rows.append(("the labels of the set", f"dfq data show {shlex.quote(name)}"))
    if material.sensitivity is not None:
        rows.append(
            (
                "what each layer's bits do",
                _line("sensitivity", model=model, recipe=recipe, data=name),
            )
        )
    if material.comparison is not None:
        rows.append(("the comparison", material.comparison.command))
    rows += [
        (f"exports/{export.source}", export.command)
        for export in material.exports
        if export.command
    ]
    rows.append(("this page", f"dfq report {RUN}"))
    return [(label, text(command, 600)) for label, command in rows]


def _line(verb: str, **options: str | None) -> str:
    words = ["dfq", verb]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", shlex.quote(value)]
    return " ".join(words)
