"""What is found layer by layer: grids and sensitivities, whatever the family."""

from __future__ import annotations

import math

from torch import Tensor

from dfq.mixed_precision.sensitivity import measure
from dfq.models.base import Detector
from dfq.ptq.activation_refinement import narrow_activations, refine_grids
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy


def check_grids_move(folded: Detector, policy: Policy, images: Tensor) -> None:
    """Quantize a twin of a folded network, and see grids move to other finite ones.

    Args:
        folded: the float network.
        policy: has at least three activations whose grids are refined.
        images: `(n, 3, h, w)` in [0, 1].
    """
    student = insert_quantizers(folded.clone(), policy)
    calibrate(student, [images])
    before = [quantizer.scale.item() for _, quantizer in narrow_activations(student)]
    assert len(before) >= 3
    refine_grids(student, folded, (images[:2] * 255).byte())
    after = [quantizer.scale.item() for _, quantizer in narrow_activations(student)]
    assert before != after
    assert all(math.isfinite(scale) for scale in after)


def check_sensitivities(folded: Detector, images: Tensor) -> None:
    """Measure every free layer of a folded network, rounded: fewer bits do more.

    Args:
        folded: the float network.
        images: `(n, 3, h, w)` in [0, 1].
    """
    found = measure(folded, Policy(), [images], [(2, 8), (8, 8)], rounding="gptq")
    free = [row for row in found if row.free]
    assert len(free) > 5
    assert all(math.isfinite(value) for row in free for value in row.divergence)
    two, eight = (sum(row.divergence[index] for row in free) for index in (0, 1))
    assert two > 3 * eight > 0
