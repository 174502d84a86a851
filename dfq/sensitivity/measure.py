"""What one layer's quantization alone does to the predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..detectors.base import Detector
from ..distillation.losses import summed_divergence
from ..quantization.convert import (
    Policy,
    float_mode,
    insert_quantizers,
    observe,
    quantized_layers,
    set_ranges,
)
from ..quantization.listing import FLOAT_KINDS, LayerInfo, describe
from ..quantization.widths import Widths, format_widths


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer and what its bits do.

    Attributes:
        name: qualified.
        macs: of one image at the detector's size.
        weights: how many.
        widths: what it may have: several where it is free, the one the policy gives it where it is
            not (first and last layers, overrides), none where it stays in float.
        divergence: mean per image of the KL divergence of the predictions from the float
            network's, with this layer alone at each of `widths`; 0 where there is no choice.
    """

    name: str
    macs: int
    weights: int
    widths: tuple[Widths, ...]
    divergence: tuple[float, ...]

    @property
    def free(self) -> bool:
        return len(self.widths) > 1

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "macs": self.macs,
            "weights": self.weights,
            "divergence": {
                format_widths(widths): value
                for widths, value in zip(self.widths, self.divergence, strict=True)
            },
        }


def choices(
    detector: Detector, policy: Policy, candidates: Sequence[Widths]
) -> list[tuple[LayerInfo, tuple[Widths, ...]]]:
    """Every layer and the widths it may have under `policy`; see `LayerSensitivity.widths`."""
    boundary = detector.boundary_layers()
    edge = {*boundary.first, *boundary.last}
    found: list[tuple[LayerInfo, tuple[Widths, ...]]] = []
    for row in describe(detector):
        fixed = policy.bits_for(row.name, row.name in edge, detector.backbone)
        if row.kind in FLOAT_KINDS:
            found.append((row, ()))
        elif row.kind == "matmul" and fixed is not None:
            # Two activations, and no weight whose width there would be to choose.
            found.append((row, ((fixed[1], fixed[1]),)))
        elif fixed is None or policy.is_fixed(row.name, row.name in edge):
            found.append((row, (fixed,) if fixed else ()))
        else:
            found.append((row, tuple(dict.fromkeys(candidates))))
    return found


@torch.no_grad()
def measure(
    teacher: Detector,
    policy: Policy,
    batches: Iterable[Tensor],
    candidates: Sequence[Widths],
    *,
    search: str = "mse",
    progress: Callable[[int, int], object] | None = None,
) -> list[LayerSensitivity]:
    """Quantize one layer at a time, weights and input, and compare the predictions.

    Args:
        teacher: the float detector, BatchNorm folded; left as it is.
        policy: which layers are free, and how scales are laid out.
        batches: images `(n, 3, h, w)` in [0, 1]; ranges are found on them too.
        candidates: widths to try.
        search: how ranges are found, a key of `ranges.SEARCHES`.
        progress: called with measurements done and measurements in all.

    Raises:
        UserError: where there is no image.
    """
    images = [batch.to(teacher.device) for batch in batches]
    options = choices(teacher, policy, candidates)
    # One layer at a time: what others share with it is not to be quantized along.
    student = insert_quantizers(teacher.twin(), replace(policy, placement="inputs"))
    layers = dict(quantized_layers(student.module))
    values = observe(student, images)
    expected = [teacher.raw(batch) for batch in images]
    count = sum(len(batch) for batch in images)
    total = sum(len(widths) for _, widths in options if len(widths) > 1)
    done = 0
    rows = []
    with float_mode(student.module):
        for info, widths in options:
            divergence = [0.0] * len(widths)
            for index, pair in enumerate(widths) if len(widths) > 1 else ():
                layer = layers[info.name]
                quantizers = (layer.weight_quantizer, layer.input_quantizer)
                for quantizer, bits in zip(quantizers, pair, strict=True):
                    quantizer.bits = bits
                    quantizer.enabled = True
                layer.weight_quantizer.asymmetric = policy.shifts_weights(pair[0])
                set_ranges(layer, values[info.name], search)
                sums = [
                    summed_divergence(student, student.raw(batch), raw)
                    for batch, raw in zip(images, expected, strict=True)
                ]
                divergence[index] = float(torch.stack(sums).sum()) / count
                for quantizer in quantizers:
                    quantizer.enabled = False
                done += 1
                if progress is not None:
                    progress(done, total)
            weights = 1
            for side in info.weight_shape:
                weights *= side
            rows.append(LayerSensitivity(info.name, info.macs, weights, widths, tuple(divergence)))
    return rows
