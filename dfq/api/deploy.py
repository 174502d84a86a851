"""`dfq deploy`: from a float model to a checked file for a target, in one call."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from ..errors import UserError, argument, shown
from ..export.dependencies import require
from ..export.targets import KINDS, Target, load_target
from ..graph.fold_batchnorm import fold
from ..models.base import Model
from ..quantization.insertion import insert_quantizers
from ..quantization.inspection import list_layers
from ..recipe import Recipe, changed_recipe, load_recipe
from ..recipe.overrides import Overrides
from ..recipe.quick import QUICK
from ..runs.deployment import Deployment, DeploymentFolder, folder_for
from ..runs.identity import contents, identity_of_recipe
from ..runs.inputs import photographs, training_data
from ..runs.loading import load_float
from ..runs.pipeline import data_identity
from ..runtime.distributed import is_main_process
from ..runtime.files import require_output_folder, user_path
from ..runtime.suggest import suggestion
from ..runtime.surroundings import Report, pick_device, reporter
from ..runtime.unfinished import short_name
from .deployment_steps import DeploymentSteps
from .expected import foretold_deployment

RECIPE = "w8a8"
"""Whose values count where neither a target nor a user says another."""

IMAGES = 128
"""Synthetic images: 8 bits take no more (docs/RESULTS.md)."""

PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "litert": ("litert_torch", "ai_edge_litert"),
}
"""What a format takes to be written and run: looked for before hours of work, not after."""


def deploy(
    model: str | Path,
    target: str | Path,
    *,
    out: str | Path | None = None,
    images: str | Path | None = None,
    data: str | Path | None = None,
    image_size: int | None = None,
    quick: bool = False,
    seed: int | None = None,
    overrides: Overrides = (),
    device: str = "auto",
    trust: bool = False,
    progress: Report = None,
) -> Deployment:
    """Quantize a detector or a classifier for a target, export it, check and time the files.

    Stopped at any point, the same call goes on where it was.

    Args:
        model: the float model.
        target: name of a shipped target, or a YAML file.
        out: folder; None: `deploy/<model>-<target>-<n>`.
        images: real photographs, no labels needed, which join calibration; None: none.
        data: a set to calibrate on; None: the synthetic one in the cache, made if need be.
        image_size: side in pixels, of the images and of the file; None: the model's.
        quick: fewer images, fewer steps; of the size that the file has.
        seed: None: 0.
        overrides: any values of the recipe that the target does not fix.
        device: of synthesis and quantization.
        trust: run what is in the checkpoint.
        progress: told how far it is.

    Raises:
        UserError: for anything the user can mend, before any work where that can be known.

    Example:
        >>> dfq.deploy("best.pt", "onnxruntime-cpu").faults
        []
    """
    told = reporter(progress, is_main_process())
    wanted = load_target(target)
    if out is not None:
        out = user_path(out, argument("out"))
        require_output_folder(out, "out")
    detector = load_float(model, trust=trust, device=pick_device(device))
    side = image_size or detector.image_size
    detector.check_size(side, argument("image-size"))
    settings = settings_for(wanted, detector, image_size, quick, seed, overrides)
    insert_quantizers(fold(detector.clone()), settings.quantization.policy())
    identity: dict[str, Any] = {
        "checkpoint": detector.fingerprint,
        "target": wanted.model_dump(mode="json"),
        "recipe": identity_of_recipe(settings),
        "image_size": side,
    }
    count = settings.synthesis.images
    if data is not None:
        calibration = training_data(data, settings, detector)
        count = len(calibration)
        identity["data"] = data_identity(calibration, data)
        identity |= contents(data=calibration)
    photos = 0
    if images is not None:
        try:
            pictures = photographs(images, settings, detector)
        except UserError as error:
            # Where a run calls them photos, they are called images here.
            text = str(error).removeprefix(f"{argument('photos')}: ")
            raise UserError(f"{argument('images')}: {text}") from None
        assert pictures is not None
        photos = len(pictures)
        identity["images"] = [str(pictures.source), photos]
        identity |= contents(images=pictures)
    stem = short_name(Path(detector.source).stem)
    if out is None:
        out = folder_for(Path("deploy"), f"{stem}-{wanted.name}", identity)
    place = DeploymentFolder(out, identity)
    if (finished := place.finished()) is not None:
        return _as_made(out, finished, new=False)
    for name in PACKAGES[wanted.format]:
        require(name, f"The target {wanted.name}")
    with (
        place.lock(),
        foretold_deployment(
            told, wanted, detector, settings, side,
            named=data is not None, count=count, photos=photos,
        ),
    ):  # fmt: skip
        steps = DeploymentSteps(place, wanted, model, detector, settings, side, told)
        steps.quantize(images, photos, data, device, trust)
        content = steps.calibration_only() if wanted.calibration else steps.exported(data)
        place.write({**content, "finished": True})
    return _as_made(out, content, new=True)


def settings_for(
    target: Target,
    detector: Model,
    image_size: int | None,
    quick: bool,
    seed: int | None,
    overrides: Overrides,
) -> Recipe:
    """The recipe by which a network is made for a target.

    Raises:
        UserError: an override contradicts the target, or what it keeps in float is not there.
    """
    fixed = target.overrides()
    values: dict[str, Any] = {
        "synthesis.images": IMAGES,
        "quantization.rounding_images": IMAGES,
        **fixed,
        **(QUICK if quick else {}),
    }
    start = load_recipe(
        RECIPE,
        values,
        seed=seed,
        synthesis__image_size=image_size,
    )
    settings = changed_recipe(start, overrides)
    for key, value in fixed.items():
        section, _, name = key.rpartition(".")
        holder: Any = settings.quantization if section else settings
        if getattr(holder, name) != value:
            raise UserError(
                f"--set {key}: the target {target.name} says {value}; leave it out, or give a "
                "target file of your own"
            )
    floats = dict.fromkeys(_float_layers(target, detector), "float")
    if floats:
        settings = changed_recipe(
            settings, {"quantization.overrides": {**settings.quantization.overrides, **floats}}
        )
    return settings


def _float_layers(target: Target, detector: Model) -> list[str]:
    """Names of the layers that a target keeps in float."""
    layers = list_layers(detector, detector.stride * 2)
    float_layers = []
    for entry in target.float_operations:
        names = [
            row.name
            for row in layers
            if (row.kind == entry if entry in KINDS else fnmatch.fnmatchcase(row.name, entry))
        ]
        # A network need not have layers of every kind.
        if not names and entry not in KINDS:
            raise UserError(
                f"target {target.name}: float_operations: this network has no layer "
                f"'{shown(entry)}', which is no kind either ({', '.join(KINDS)})"
                f"{suggestion(entry, (*KINDS, *(row.name for row in layers)))}"
            )
        float_layers += names
    return float_layers


def _as_made(folder: Path, content: dict[str, Any], *, new: bool) -> Deployment:
    model = content.get("model_file")
    return Deployment(
        folder,
        folder / model if model else None,
        folder / content["float_file"],
        list(content["faults"]),
        list(content["said"]),
        list(content["next"]),
        content,
        new,
    )
