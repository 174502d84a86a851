"""Post-training quantization: insert, calibrate, refine, round."""

from __future__ import annotations

from torch import Tensor, nn

from ..data.pixels import Pixels
from ..graph.equalization import equalize
from ..graph.fold_batchnorm import fold
from ..models.base import AnyModel, Model
from ..quantization.calibration import calibrate
from ..quantization.insertion import insert_quantizers
from ..quantization.margins import keep_within_statistics
from ..quantization.policy import Policy
from ..quantization.quantizers import Quantizer
from ..quantization.settings import Quantization
from ..quantization.traversal import quantized_layers
from ..runtime.progress import Progress
from .activation_refinement import narrow_activations, refine_grids
from .bias_correction import correct_biases
from .gptq import gptq_quantize, is_too_wide
from .prediction_search import METRICS, search_grids

MARGIN_IMAGES = 16
"""Of the calibration, which tell where ranges depend on the contrast."""


def images_to_prepare(section: Quantization) -> int:
    """How many images `calibrate_and_round` looks at."""
    rounding = section.rounding_images if section.rounding == "gptq" else 0
    return max(section.calibration_images, section.refine_images, rounding)


def float_start(detector: AnyModel, section: Quantization, progress: Progress) -> AnyModel:
    """Fold BatchNorm and, where `section` says so, equalise the layers of a float detector, in
    place: what is quantized, and the teacher that it is compared with. Returns it."""
    fold(detector)
    if section.equalizes:
        pairs = len(equalize(detector))
        progress.note(
            f"equalization: {pairs} pairs of layers"
            if pairs
            else "equalization: no two layers have ReLU, leaky ReLU or nothing between them alone: "
            "nothing to do"
        )
    return detector


def calibrate_and_round(
    student: Model,
    teacher: Model,
    pixels: Tensor,
    section: Quantization,
    progress: Progress,
) -> None:
    """Find the quantizers' initial scales and round the weights as `section` says.

    Args:
        student: with quantizers inserted; changed in place.
        teacher: the folded float detector, on the same device.
        pixels: uint8 `(n, 3, h, w)`, `images_to_prepare` of them, or all there are.
        section: of the recipe.
        progress: told how far rounding is.
    """
    batches = (batch.float() / 255 for batch in pixels[: section.calibration_images].split(8))
    calibrate(student, batches, search=section.local_search)
    if section.ranges in METRICS:
        with progress.task("ranges", 1, "activations") as task:
            seen = pixels[: section.refine_images]
            search_grids(student, teacher, seen, section.ranges, progress=task.update)
    # The other searches are rules of their own, to be compared with.
    least_squares = section.ranges == "mse" and section.activation_ranges == "static"
    if least_squares:
        keep_within_statistics(student, pixels[:MARGIN_IMAGES])
    refined = section.refine_images if least_squares else 0
    if refined and narrow_activations(student):
        with progress.task("ranges", 1, "activations") as task:
            refine_grids(student, teacher, pixels[:refined], progress=task.update)
    if section.rounding == "gptq":
        for name, layer in quantized_layers(student.module):
            if is_too_wide(layer):
                progress.note(
                    f"rounding: {name} has too many inputs for gptq: to the nearest level"
                )
        with progress.task("rounding", 1, "layers") as task:
            gptq_quantize(student, teacher, pixels[: section.rounding_images], progress=task.update)
    if section.corrects_biases:
        correct_biases(student, teacher, pixels[: section.calibration_images])


def clip_strictly(module: nn.Module) -> None:
    """Give quantizers the gradient of LSQ's eq. 3, which goes with its start."""
    for child in module.modules():
        if isinstance(child, Quantizer):
            child.strict = True


def quantized(
    teacher: AnyModel,
    policy: Policy,
    section: Quantization,
    data: Pixels | None,
    progress: Progress,
) -> AnyModel:
    """A copy of the folded `teacher` with quantizers; unless `data` is None calibrated on it, and
    its weights rounded as `section` says."""
    student = insert_quantizers(teacher.clone(), policy)
    if section.ranges == "lsq":
        clip_strictly(student.module)
    if data is not None:
        pixels = data.load(list(range(min(images_to_prepare(section), len(data)))))
        calibrate_and_round(student, teacher, pixels, section, progress)
    return student
