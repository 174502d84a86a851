"""That grids of activations can be refined, whatever the family."""

from __future__ import annotations

import math

from torch import Tensor

from dfq.detectors.base import Detector
from dfq.quantization.convert import Policy, calibrate, insert_quantizers
from dfq.reconstruction.activation_grids import narrow_activations, refine_grids


def check_grids_move(folded: Detector, policy: Policy, images: Tensor) -> None:
    """Quantize a twin of a folded network, and see grids move to other finite ones.

    Args:
        folded: the float network.
        policy: has at least three activations whose grids are refined.
        images: `(n, 3, h, w)` in [0, 1].
    """
    student = insert_quantizers(folded.twin(), policy)
    calibrate(student, [images])
    before = [quantizer.scale.item() for _, quantizer in narrow_activations(student)]
    assert len(before) >= 3
    refine_grids(student, folded, (images[:2] * 255).byte())
    after = [quantizer.scale.item() for _, quantizer in narrow_activations(student)]
    assert before != after
    assert all(math.isfinite(scale) for scale in after)
