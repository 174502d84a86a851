"""Post-training quantization: insert, calibrate, refine, round, reconstruct."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.pixels import Pixels
from ..errors import UserError
from ..graph.equalization import equalize
from ..graph.fold_batchnorm import fold
from ..models.base import AnyModel, Model, Targets
from ..models.divergence import total_divergence
from ..quantization.calibration import calibrate
from ..quantization.insertion import insert_quantizers
from ..quantization.margins import keep_within_statistics
from ..quantization.policy import Policy
from ..quantization.quantizers import Quantizer
from ..quantization.settings import Quantization
from ..quantization.traversal import quantized_layers
from ..runtime.files import write_atomic
from ..runtime.malloc import freed_memory_kept
from ..runtime.progress import Progress
from .activation_refinement import narrow_activations, refine_grids
from .bias_correction import correct_biases
from .block_io import ROOM
from .blocks import BATCH, reconstruct
from .gptq import gptq_quantize, is_too_wide
from .last_layer_ranges import search_last_inputs
from .objectives import METHODS
from .prediction_search import METRICS, search_grids
from .variety import sees_other_worlds, with_variety

COMPARED = 64
"""Images of the set that tell whether reconstruction came closer than the start it had."""

MARGIN_IMAGES = 16
"""Of the calibration, which tell where ranges depend on the contrast."""


def images_to_prepare(section: Quantization) -> int:
    """How many images `calibrate_and_round` looks at."""
    rounding = 0 if section.reconstruction == "none" else section.rounding_images
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
    # The other searches are rules of their own, to be compared with.
    least_squares = section.ranges == "mse" and section.activation_ranges == "static"
    with progress.task("calibration", 1 + least_squares, "steps") as task:
        task.update(0, 1 + least_squares)
        batches = (batch.float() / 255 for batch in pixels[: section.calibration_images].split(8))
        calibrate(student, batches, search=section.local_search)
        task.update(1, 1 + least_squares)
        if least_squares:
            keep_within_statistics(student, pixels[:MARGIN_IMAGES])
            search_last_inputs(student, teacher, pixels[:MARGIN_IMAGES])
            task.update(2, 2)
    if section.ranges in METRICS:
        with progress.task("ranges", 1, "activations") as task:
            images = pixels[: section.refine_images]
            search_grids(student, teacher, images, section.ranges, progress=task.update)
    refined = section.refine_images if least_squares else 0
    if refined and narrow_activations(student):
        with progress.task("ranges", 1, "activations") as task:
            refine_grids(student, teacher, pixels[:refined], progress=task.update)
    if section.reconstruction == "gptq" or starts_from_gptq(section):
        for name, layer in quantized_layers(student.module):
            if is_too_wide(layer):
                progress.note(
                    f"rounding: {name} has too many inputs for gptq: to the nearest level"
                )
        with progress.task("rounding", 1, "layers") as task:
            images = pixels[: section.rounding_images]
            if sees_other_worlds(student, section):
                images = with_variety(images)
            gptq_quantize(student, teacher, images, progress=task.update)
    if section.corrects_biases:
        correct_biases(student, teacher, pixels[: section.calibration_images])


def starts_from_gptq(section: Quantization) -> bool:
    """Whether blocks are reconstructed from the integers that GPTQ rounds to."""
    method = METHODS.get(section.reconstruction)
    return method is not None and method.start == "gptq"


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
    its weights rounded as `section` says. Blocks are left to `with_reconstructed_blocks`, and what
    that refuses is refused here, before the work."""
    if data is not None:
        _require_labels(section, data)
    student = insert_quantizers(teacher.clone(), policy)
    if section.ranges == "lsq":
        clip_strictly(student.module)
    if data is not None:
        pixels = data.load(list(range(min(images_to_prepare(section), len(data)))))
        calibrate_and_round(student, teacher, pixels, section, progress)
    return student


def _require_labels(section: Quantization, data: Pixels) -> None:
    method = METHODS.get(section.reconstruction)
    if method is not None and method.labels and getattr(data, "targets", None) is None:
        raise UserError(
            f"quantization.reconstruction: {section.reconstruction} needs the labels of the set; "
            "leave --photos out, or use another method"
        )


def reconstructs_blocks(section: Quantization) -> bool:
    """Whether blocks are reconstructed after rounding."""
    return section.reconstruction in METHODS


def with_reconstructed_blocks(
    student: AnyModel,
    teacher: AnyModel,
    section: Quantization,
    data: Pixels,
    progress: Progress,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    room: int = ROOM,
) -> AnyModel:
    """What `quantized` gave, changed in place: with its blocks reconstructed as `section` says.

    Args:
        student: the calibrated network.
        teacher: the folded float one.
        section: of the recipe; its reconstruction is a method of blocks.
        data: images, with labels where the method looks at them.
        progress: told how far it is.
        seed: fixes the order of batches and what is dropped.
        checkpoint: a file that is written after each block and gone on from; None: none is. It is
            there when all is done; who asked for it deletes it.
        room: bytes of a block's inputs and outputs that are kept on the host.

    Raises:
        UserError: there are no labels, and the method needs them; the checkpoint cannot be read.
    """
    _require_labels(section, data)
    method, labels = METHODS[section.reconstruction], getattr(data, "targets", None)
    count = min(section.rounding_images, len(data))
    pixels = data.load(list(range(count)))
    begun = clone_state(student)
    done = 0
    if checkpoint is not None and checkpoint.is_file():
        done, begun = _restored(student, checkpoint)

    def targets(batch: int) -> Targets:
        assert labels is not None
        batch_targets: Targets = labels(list(range(batch * BATCH, min((batch + 1) * BATCH, count))))
        return batch_targets.to(student.device)

    with progress.task("reconstruction", 1, "blocks") as task, freed_memory_kept():

        def after(block: int, blocks: int) -> None:
            if checkpoint is not None:
                _save(student, checkpoint, block, begun)
            task.update(block, blocks)

        reconstruct(
            student,
            teacher,
            pixels,
            method,
            iterations=section.reconstruction_iterations,
            seed=seed,
            room=room,
            targets=targets,
            first=done,
            after=after,
        )
    if method.start == "gptq" and not _kept_if_closer(student, begun, teacher, pixels[:COMPARED]):
        progress.note("reconstruction: no closer to the float network than gptq's start, kept")
    return student


def clone_state(student: Model) -> dict[str, Tensor]:
    """A copy of what the network is made of."""
    return {name: value.clone() for name, value in student.module.state_dict().items()}


def _kept_if_closer(
    student: Model, begun: dict[str, Tensor], teacher: Model, pixels: Tensor
) -> bool:
    """Put a network back into an earlier state unless it has come closer to its teacher on images
    since; says whether it has."""
    after = clone_state(student)
    end = total_divergence(student, teacher, pixels.split(BATCH))
    student.module.load_state_dict(begun)
    if bool(end >= total_divergence(student, teacher, pixels.split(BATCH))):
        return False
    student.module.load_state_dict(after)
    return True


def _save(student: Model, checkpoint: Path, done: int, begun: dict[str, Tensor]) -> None:
    buffer = io.BytesIO()
    state = student.module.state_dict()
    torch.save({"done": done, "student": state, "begun": begun}, buffer)
    write_atomic(checkpoint, buffer.getvalue())


def _restored(student: Model, checkpoint: Path) -> tuple[int, dict[str, Tensor]]:
    """How many blocks are done, with the student as it was then, and its state before the first."""
    try:
        state = torch.load(checkpoint, map_location=student.device, weights_only=True)
        student.module.load_state_dict(state["begun"])
        student.module.load_state_dict(state["student"])
        return int(state["done"]), state["begun"]
    except Exception as error:
        raise UserError(
            f"{checkpoint}: cannot be read ({type(error).__name__}); delete it to start the "
            "reconstruction over"
        ) from None
