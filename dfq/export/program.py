"""The reference quantized program: a detector as `torch.export` gives it, with quantize and
dequantize operations that carry the learned scales and frozen integers.

Every file is lowered from it by a converter of its format, and it is what files are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..detectors.base import Detector, Part
from ..detectors.matmul import Matmul
from ..quantization.layers import QuantConv2d, QuantLinear, QuantMatmul, QuantSiLU, gated_silu
from ..quantization.placement import PLACEMENTS
from ..quantization.quantizers import Quantizer
from ..quantization.results import RESULTS, requantize_results
from .grids import Grid, grid_of, integer_weight
from .passes import tidy

OPS = torch.ops.quantized_decomposed


class Ends(nn.Module):
    """Cuts a tensor off where a grid ends, without putting it there."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(*self.grid.values)


class QuantizeDequantize(nn.Module):
    """Puts a tensor on a grid, as runtimes are told to: quantize, then dequantize."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        if not self.grid.fills_type:
            # Runtimes saturate where the integer type ends, not where a narrower grid does.
            x = x.clamp(*self.grid.values)
        arguments = self.grid.arguments()
        return OPS.dequantize_per_tensor(OPS.quantize_per_tensor(x, *arguments), *arguments)


class Weight(nn.Module):
    """A layer's weight as int8 constants with one dequantize.

    Args:
        layer: quantized.
        floating: keep the weight itself, quantized and dequantized in the program, as LiteRT's
            converter wants it.
        plain: the values themselves, in float32.
        columns: transposed, with the outputs in the last axis.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        layer: QuantConv2d | QuantLinear,
        *,
        floating: bool,
        plain: bool = False,
        columns: bool = False,
    ) -> None:
        super().__init__()
        integers, scale = integer_weight(layer)
        self.floating, self.plain, self.axis = floating, plain, 1 if columns else 0
        if columns:
            integers = integers.flatten(1).T.contiguous()
        if floating or plain:
            shape = [1] * integers.ndim
            shape[self.axis] = -1
            self.register_buffer("values", integers.float() * scale.view(shape))
        else:
            self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(len(scale), dtype=torch.int64))

    def forward(self) -> Tensor:
        if self.plain:
            return self.values
        where = (self.scale, self.zero_point, self.axis, -127 if self.floating else -128, 127)
        integers = (
            OPS.quantize_per_channel(self.values, *where, torch.int8)
            if self.floating
            else self.integers
        )
        return OPS.dequantize_per_channel(integers, *where, torch.int8)


class _Layer(nn.Module):
    """A convolution or linear layer in the program."""

    def __init__(
        self,
        layer: QuantConv2d | QuantLinear,
        grid: Callable[[Quantizer | None], nn.Module],
        *,
        floating: bool,
        plain: bool,
        as_product: bool,
    ) -> None:
        super().__init__()
        self.on_input = grid(layer.input_quantizer)
        self.on_output = grid(layer.output_quantizer)
        self.bias = layer.bias
        if as_product and layer.bias is not None:
            # To be subtracted.
            self.bias = nn.Parameter(-layer.bias.detach(), requires_grad=False)
        self.convolution = layer if isinstance(layer, QuantConv2d) else None
        # Of a module that is a child, the parameters would be exported too.
        if self.convolution is not None:
            conv = self.convolution
            self.geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
            self.padding_mode, self.pads = conv.padding_mode, conv._reversed_padding_repeated_twice
        del self.convolution
        self.is_convolution = isinstance(layer, QuantConv2d)
        self.as_product = as_product
        self.weight = Weight(layer, floating=floating, plain=plain, columns=as_product)

    def forward(self, x: Tensor) -> Tensor:
        x = self.on_input(x)
        weight = self.weight()
        if self.as_product:
            rows = x.permute(0, 2, 3, 1) if self.is_convolution else x
            y = torch.matmul(rows, weight)
            if self.bias is not None:
                # Of a sum, onnxruntime makes one float layer with the product.
                y = y - self.bias
            y = y.permute(0, 3, 1, 2) if self.is_convolution else y
        elif not self.is_convolution:
            y = F.linear(x, weight, self.bias)
        else:
            stride, padding, dilation, groups = self.geometry
            if self.padding_mode != "zeros":
                x, padding = F.pad(x, self.pads, mode=self.padding_mode), (0, 0)
            y = F.conv2d(x, weight, self.bias, stride, padding, dilation, groups)
        return self.on_output(y)


class _Product(Matmul):
    """A product of two activations in the program."""

    def __init__(self, layer: QuantMatmul, grid: Callable[[Quantizer], nn.Module]) -> None:
        super().__init__()
        self.left, self.right = grid(layer.left_quantizer), grid(layer.right_quantizer)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return super().forward(self.left(left), self.right(right))


class _SiLU(nn.Module):
    """SiLU in two steps, with its sigmoid on a grid."""

    def __init__(self, step: float, *, signed: bool) -> None:
        super().__init__()
        low = -128 if signed else 0
        dtype = torch.int8 if signed else torch.uint8
        scale = float(torch.tensor(step))
        self.on_sigmoid = QuantizeDequantize(Grid(scale, low, low, low + 255, dtype))

    def forward(self, x: Tensor) -> Tensor:
        return gated_silu(x, self.on_sigmoid)


class _Graph(nn.Module):
    """What a file computes: images in, the family's outputs out."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector, self.module = detector, detector.module

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        raw = self.detector.exportable(images)
        shape = (images.shape[2], images.shape[3])
        return tuple(self.detector.outputs(raw, shape).values())


class _PartGraph(nn.Module):
    """What the file of a detector's part computes."""

    def __init__(self, detector: Detector, part: Part) -> None:
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


def as_program(detector: Detector, runtime: str, *, in_place: bool = False) -> Detector:
    """A detector whose quantized layers are written as quantize and dequantize operations.

    Args:
        detector: float or quantized, BatchNorm folded.
        runtime: a key of `PLACEMENTS`, or "torch".
        in_place: change `detector` itself.
    """
    detector = detector if in_place else detector.twin()
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
            made = grid_of(quantizer, signed=signed)
            # OpenVINO 2026.4 computes wrong values of some grids of 16 bits, by up to half of the
            # deviation of what comes out. It computes them in float anyway, where steps so small
            # are next to nothing.
            in_float = runtime == "openvino" and quantizer.bits > 8
            grids[quantizer] = Ends(made) if in_float else QuantizeDequantize(made)
        return grids[quantizer]

    def write(child: nn.Module) -> nn.Module | None:
        if isinstance(child, (QuantConv2d, QuantLinear)):
            product = runtime == "onnxruntime" and _fits_product(child)
            # With int8 constants, onnxruntime computes products, and OpenVINO anything, with
            # activations of 8 bits, whatever those are said to have.
            product_alone = runtime == "onnxruntime" and isinstance(child, QuantLinear)
            plain = child.input_quantizer.bits > 8 and (product_alone or runtime == "openvino")
            return _Layer(child, grid, floating=floating, plain=plain, as_product=product)
        if isinstance(child, QuantMatmul):
            return _Product(child, grid)
        if isinstance(child, QuantSiLU):
            return _SiLU(child.step, signed=signed)
        return None

    requantize_results(module, grid)
    if hasattr(module, RESULTS):
        delattr(module, RESULTS)
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if child not in written:
                made = write(child)
                if made is None:
                    continue
                written[child] = made
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
    detector: Detector,
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
    made = as_program(detector, runtime)
    shape: tuple[int, ...] = (3, image_size, image_size)
    graph: nn.Module = _Graph(made)
    if part is not None:
        chosen = made.parts(image_size)[part]
        graph, shape, names = _PartGraph(made, chosen), chosen.shape, chosen.outputs
    else:
        with torch.no_grad():
            raw = detector.exportable(torch.zeros(1, *shape))
            names = tuple(detector.outputs(raw, (image_size, image_size)))
    graph.eval()
    example = torch.zeros(2 if dynamic else batch, *shape)
    shapes: Any = ({0: Dim.DYNAMIC},) if dynamic else None
    with torch.no_grad():
        exported = torch.export.export(graph, (example,), dynamic_shapes=shapes)
    tidy(exported.graph, shield=runtime in ("onnxruntime", "litert"))
    for node in exported.graph.nodes:
        # Names folders of this machine.
        node.meta.pop("stack_trace", None)
    exported.graph_module.recompile()
    return Program(exported, names, shape)
