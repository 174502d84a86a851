"""What one layer's quantization alone does to the predictions."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from ..graph.execution import last_layer_of_block
from ..graph.outline import outline
from ..models.base import Model
from ..models.divergence import summed_divergence
from ..ptq.block_cache import BlockOutputCache
from ..ptq.gptq import SAMPLES, gptq_quantize_layer, is_too_wide
from ..ptq.input_moments import Moments, MomentSums, execution_order, inputs_of
from ..quantization.bit_widths import Widths, format_widths
from ..quantization.calibration import run_observers, set_range, set_weight_range
from ..quantization.insertion import insert_quantizers
from ..quantization.inspection import FLOAT_KINDS, LayerInfo, list_layers
from ..quantization.layers import QuantConv2d, QuantLinear
from ..quantization.policy import Policy
from ..quantization.quantizers import Quantizer
from ..quantization.range_search import FINE
from ..quantization.traversal import activation_quantizers, float_mode, quantized_layers


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
                format_widths(widths): divergence
                for widths, divergence in zip(self.widths, self.divergence, strict=True)
            },
        }


def choices(
    detector: Model, policy: Policy, candidates: Sequence[Widths]
) -> list[tuple[LayerInfo, tuple[Widths, ...]]]:
    """Every layer and the widths it may have under `policy`; see `LayerSensitivity.widths`."""
    edge = outline(detector).edge
    options: list[tuple[LayerInfo, tuple[Widths, ...]]] = []
    for row in list_layers(detector):
        fixed = policy.bits_for(row.name, row.name in edge, detector.backbone)
        if row.kind in FLOAT_KINDS:
            options.append((row, ()))
        elif row.kind == "matmul" and fixed is not None:
            # Two activations, and no weight whose width there would be to choose.
            options.append((row, ((fixed[1], fixed[1]),)))
        elif fixed is None or policy.is_fixed(row.name, row.name in edge):
            options.append((row, (fixed,) if fixed else ()))
        else:
            options.append((row, tuple(dict.fromkeys(candidates))))
    return options


def unmeasured(
    detector: Model, policy: Policy, candidates: Sequence[Widths]
) -> list[LayerSensitivity]:
    """Every layer with what it costs and what it may have; divergences are 0."""
    return [
        LayerSensitivity(
            info.name, info.macs, math.prod(info.weight_shape), widths, (0.0,) * len(widths)
        )
        for info, widths in choices(detector, policy, candidates)
    ]


@torch.no_grad()
def measure(
    teacher: Model,
    policy: Policy,
    batches: Iterable[Tensor],
    candidates: Sequence[Widths],
    *,
    search: str = "mse",
    rounding: str = "nearest",
    calibration: Iterable[Tensor] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[LayerSensitivity]:
    """Quantize one layer at a time, weights and input, and compare the predictions.

    What a width costs hangs on the rounding: at 4 bits, errors that are made up for within their
    layer are a small part of those of nearest rounding, and not the same part in all layers.

    Args:
        teacher: the float detector, BatchNorm folded; left as it is.
        policy: which layers are free, and how scales are laid out.
        batches: images `(n, 3, h, w)` in [0, 1].
        candidates: widths to try.
        search: how ranges are found, a key of `range_search.SEARCHES`.
        rounding: "gptq" (see `gptq`) or "nearest".
        calibration: images that ranges are found on, and what rounding makes up for; None: the
            `batches`.
        progress: called with measurements done and measurements in all.

    Raises:
        UserError: where there is no image.
    """
    images = [batch.to(teacher.device) for batch in batches]
    known = images if calibration is None else [b.to(teacher.device) for b in calibration]
    options = choices(teacher, policy, candidates)
    # One layer at a time: what others share with it is not to be quantized along.
    grids = "asymmetric" if policy.asymmetric else "symmetric"
    alone = replace(policy, placement="inputs", activations=grids)
    student = insert_quantizers(teacher.clone(), alone)
    for _, module in quantized_layers(student.module):
        # Of the placement, this is what a layer has of its own.
        module.weight_quantizer.narrow = policy.where.narrow_weights
    for _, quantizer in activation_quantizers(student.module):
        quantizer.unsigned = policy.unsigned
    values = run_observers(student, known)
    calls = execution_order(student.module, lambda: student.raw(images[0][:1]))
    free = {info.name: widths for info, widths in options if len(widths) > 1}
    # As they run, so that what comes before a layer need not be computed again; first those that
    # one image does not get to.
    order = [*(name for name in free if not calls[name]), *calls]
    blocks = student.blocks()
    ended = last_layer_of_block(order, blocks)
    expected = [teacher.raw(batch) for batch in images]
    divergences = {info.name: [0.0] * len(widths) for info, widths in options}
    count = sum(len(batch) for batch in images)
    done, total = 0, sum(len(widths) for widths in free.values())
    with (
        float_mode(student.module),
        BlockOutputCache.of(student, images, blocks) as student_outputs,
        # Nothing but rounding looks at the float network's features.
        BlockOutputCache.of(
            teacher, known, blocks if rounding == "gptq" else ()
        ) as teacher_outputs,
    ):
        for name in order:
            widths = free.get(name, ())
            layer = _Layer(student, teacher, name, values[name], widths, search)
            moments = {}
            if rounding == "gptq" and widths and calls[name] and not is_too_wide(layer.layer):
                moments = layer.moments(teacher_outputs, len(known), calls[name])
            for index, candidate in enumerate(widths):
                with layer.quantized(
                    candidate, policy.shifts_weights(candidate[0]), moments.get(candidate[1])
                ):
                    sums = [
                        summed_divergence(student, student_outputs.run(number), raw)
                        for number, raw in enumerate(expected)
                    ]
                divergences[name][index] = float(torch.stack(sums).sum()) / count
                done += 1
                if progress is not None:
                    progress(done, total)
            if name in ended:
                student_outputs.finish(ended[name])
                teacher_outputs.finish(ended[name])
    return [
        LayerSensitivity(
            info.name,
            info.macs,
            math.prod(info.weight_shape),
            widths,
            tuple(divergences[info.name]),
        )
        for info, widths in options
    ]


class _Layer:
    """One layer of a student all of whose quantizers are off.

    Args:
        student, teacher: the same float network, one with quantizers.
        name: of the layer.
        values: that reach its input, `(n,)`.
        widths: it will have.
        search: how ranges are found.
    """

    def __init__(
        self,
        student: Model,
        teacher: Model,
        name: str,
        values: Tensor,
        widths: Sequence[Widths],
        search: str,
    ) -> None:
        layer = student.module.get_submodule(name)
        assert isinstance(layer, QuantConv2d | QuantLinear)
        self.layer, self.original = layer, teacher.module.get_submodule(name)
        self.search = search
        self.inputs: dict[int, Quantizer] = {}
        for bits in dict.fromkeys(bits for _, bits in widths):
            self.inputs[bits] = copy.deepcopy(layer.input_quantizer)
            self.inputs[bits].bits, self.inputs[bits].enabled = bits, True
            set_range(self.inputs[bits], values, search)

    @contextlib.contextmanager
    def quantized(self, widths: Widths, shifted: bool, moments: Moments | None) -> Iterator[None]:
        """Within this context it computes with `widths`, its weights rounded so that they make up
        for the errors on what `moments` were taken of, or to the nearest level."""
        weights, off = self.layer.weight_quantizer, self.layer.input_quantizer
        weights.bits, weights.asymmetric, weights.enabled = widths[0], shifted, True
        set_weight_range(self.layer, self.search)
        self.layer.input_quantizer = self.inputs[widths[1]]
        if moments is not None:
            gptq_quantize_layer(self.layer, self.original, moments)
        try:
            yield
        finally:
            weights.enabled, self.layer.input_quantizer = False, off
            # Rounding has changed weight and bias.
            self.layer.load_state_dict(self.original.state_dict(), strict=False)

    def moments(self, network: BlockOutputCache, batches: int, calls: int) -> dict[int, Moments]:
        """Of what it is given in the float `network`, in `calls` calls of a pass, with and without
        a quantizer: by the bits of that, one pass for all of them."""
        sums = {
            bits: MomentSums(self.layer, SAMPLES, batches * calls, Generator().manual_seed(0))
            for bits in self.inputs
        }
        off = self.layer.input_quantizer
        for number in range(batches):
            for x in inputs_of(self.original, calls, partial(network.run, number)):
                for bits, moment_sums in sums.items():
                    # As in `gptq_quantize`.
                    self.layer.input_quantizer = off if bits >= FINE else self.inputs[bits]
                    moment_sums.add(x, x)
        self.layer.input_quantizer = off
        return {bits: moment_sums.moments() for bits, moment_sums in sums.items()}
