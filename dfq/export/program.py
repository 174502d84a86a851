"""The reference quantized program: a detector as `torch.export` gives it, with quantize and
dequantize operations that carry the learned scales and frozen integers.

Every file is lowered from it by a converter of its format, and it is what files are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..models.base import Model, Part
from ..quantization.layers import QuantConv2d, QuantLinear, QuantMatmul, QuantSiLU
from ..quantization.output_quantizers import RESULTS, requantize_results
from ..quantization.placement import PLACEMENTS
from ..quantization.quantizers import Quantizer
from .grids import grid_of
from .passes import tidy
from .passes_litert import suit_converter
from .written import Ends, GatedSiLU, Layer, Product, QuantizeDequantize


class _Graph(nn.Module):
    """What a file computes: images in, the family's outputs out."""

    def __init__(self, detector: Model) -> None:
        super().__init__()
        self.detector, self.module = detector, detector.module

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        raw = self.detector.exportable(images)
        shape = (images.shape[2], images.shape[3])
        return tuple(self.detector.outputs(raw, shape).values())


class _PartGraph(nn.Module):
    """What the file of a detector's part computes."""

    def __init__(self, detector: Model, part: Part) -> None:
        super().__init__()
        self.module, self.run = detector.module, part.run

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.run(images))


@dataclass(frozen=True)
class Program:
    """A detector as a runtime is to execute it.

    Attributes:
        exported: takes images `(n, 3, h, w)` in [0, 1], or what a part is given.
        outputs: names of what it returns, in order.
        shape: of one image.
    """

    exported: ExportedProgram
    outputs: tuple[str, ...]
    shape: tuple[int, ...]

    def module(self) -> nn.Module:
        """The program, to be run by PyTorch."""
        return self.exported.module()


def input_shape(exported: ExportedProgram) -> tuple[int | None, ...]:
    """Shape of what an exported program calls images; None where a side is free."""
    node = next(node for node in exported.graph.nodes if node.name == "images")
    return tuple(side if isinstance(side, int) else None for side in node.meta["val"].shape)


def as_program(detector: Model, runtime: str) -> Model:
    """A detector whose quantized layers are written as quantize and dequantize operations.

    Args:
        detector: float or quantized, BatchNorm folded.
        runtime: a key of `PLACEMENTS`, or "torch".
    """
    detector = detector.clone()
    where = PLACEMENTS.get(runtime)
    signed = where is not None and where.signed
    floating = runtime == "litert"
    module = detector.module
    grids: dict[Quantizer, nn.Module] = {}
    written: dict[nn.Module, nn.Module] = {}

    def grid(quantizer: Quantizer | None) -> nn.Module:
        if quantizer is None:
            return nn.Identity()
        if quantizer not in grids:
            integer_grid = grid_of(quantizer, signed=signed)
            # OpenVINO 2026.4 computes wrong values of some grids of 16 bits, by up to half of the
            # output's deviation. It computes them in float anyway, where steps so small hardly
            # matter.
            in_float = runtime == "openvino" and quantizer.bits > 8
            grids[quantizer] = Ends(integer_grid) if in_float else QuantizeDequantize(integer_grid)
        return grids[quantizer]

    def write(child: nn.Module) -> nn.Module | None:
        if isinstance(child, (QuantConv2d, QuantLinear)):
            product = runtime == "onnxruntime" and _fits_product(child)
            # With int8 constants, onnxruntime computes products, and OpenVINO anything, with
            # activations of 8 bits, even where they are given 16.
            product_alone = runtime == "onnxruntime" and isinstance(child, QuantLinear)
            plain = child.input_quantizer.bits > 8 and (product_alone or runtime == "openvino")
            return Layer(child, grid, floating=floating, plain=plain, as_product=product)
        if isinstance(child, QuantMatmul):
            return Product(child, grid)
        if isinstance(child, QuantSiLU):
            return GatedSiLU(child.step, signed=signed)
        return None

    requantize_results(module, grid)
    if hasattr(module, RESULTS):
        delattr(module, RESULTS)
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if child not in written:
                replacement = write(child)
                if replacement is None:
                    continue
                written[child] = replacement
            setattr(parent, name, written[child])
    return detector


def _fits_product(layer: QuantConv2d | QuantLinear) -> bool:
    """Whether a layer whose output is on no grid is computed in integers as a matrix product alone:
    onnxruntime has none of a convolution, and of a linear layer with a transposed weight."""
    if layer.output_quantizer is not None or layer.input_quantizer.bits > 8:
        return False
    if isinstance(layer, QuantLinear):
        return True
    return (
        layer.kernel_size == (1, 1)
        and layer.stride == (1, 1)
        and layer.groups == 1
        and layer.padding in ((0, 0), "valid", "same")
    )


def build(
    detector: Model,
    runtime: str,
    *,
    image_size: int,
    dynamic: bool = False,
    batch: int = 1,
    part: str | None = None,
) -> Program:
    """Export a detector, float or quantized, as one program.

    Args:
        detector: BatchNorm folded; left as it is.
        runtime: a key of `PLACEMENTS`, or "torch".
        image_size: side in pixels.
        dynamic: leave the number of images free.
        batch: images, where it is not.
        part: one of the detector's `parts` instead of what is before them.

    Raises:
        UserError: where the family cannot be exported.
    """
    lowered = as_program(detector, runtime)
    shape: tuple[int, ...] = (3, image_size, image_size)
    graph: nn.Module = _Graph(lowered)
    if part is not None:
        detector_part = lowered.parts(image_size)[part]
        graph = _PartGraph(lowered, detector_part)
        shape, names = detector_part.shape, detector_part.outputs
    else:
        with torch.no_grad():
            raw = detector.exportable(torch.zeros(1, *shape))
            names = tuple(detector.outputs(raw, (image_size, image_size)))
    graph.eval()
    example = torch.zeros(2 if dynamic else batch, *shape)
    shapes: Any = ({0: Dim.DYNAMIC},) if dynamic else None
    with torch.no_grad():
        exported = torch.export.export(graph, (example,), dynamic_shapes=shapes)
    shield = runtime in ("onnxruntime", "litert")
    # OpenVINO moves the grid of a concatenation to its operands, beside the one that they have: the
    # layer in front writes float32 then, for two operations to quantize.
    bare_joins = runtime == "openvino"
    tidy(exported.graph, shield=shield, apart=runtime == "litert", bare_joins=bare_joins)
    if runtime == "litert":
        suit_converter(exported.graph)
    for node in exported.graph.nodes:
        # Names folders of this machine.
        node.meta.pop("stack_trace", None)
    exported.graph_module.recompile()
    return Program(exported, names, shape)
