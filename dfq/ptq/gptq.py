"""GPTQ with asymmetric calibration (GPTAQ): each layer is rounded to match the float one's output.

Rounded to the nearest level, each weight errs on its own, and errors add up over a layer and over
the network. Here a layer's weights are rounded one input after another, and what the rounding of
one has done to the output is made up for by those that are still to come (Frantar et al., GPTQ,
2022, after Hassibi and Stork's Optimal Brain Surgeon). The target is what the *float* network
gives, from the inputs the *quantized* one provides (as GPTAQ, Li et al. 2025), so that a layer also
corrects what those before it got wrong:

    W' = argmin E ||W y - W' x||^2 + r ||W' - W||^2,   W' on the grid,

y the float layer's input and x the quantized one's at the same place of the same image. Everything
that is needed of the images are second moments, which a few dozen of them settle: it neither
overfits them as training does, nor takes more than a few passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Generator, Tensor, nn

from ..errors import UserError
from ..graph.execution import last_layer_of_block
from ..models.base import Model
from ..quantization.layers import QuantConv2d, QuantLinear, QuantSiLU
from ..quantization.quantizers import Quantizer
from ..quantization.range_search import FINE, grid_between
from ..quantization.traversal import activation_quantizers, quantized_layers
from .block_cache import BlockOutputCache
from .input_moments import Moments, MomentSums, execution_order, inputs_of

SAMPLES = 24_000
"""Output samples looked at in each layer: ten for each input of the widest ones."""

WIDEST = 16_384
"""Inputs of a layer from whose second moments weights are still rounded: 1 GiB, of which several
are needed at a time. Weights of wider layers are rounded to the nearest level."""

CROWDED = 20.0
"""How much stronger the pull towards the float weights is for each input a place has to settle."""

CLIP_RATIOS = (0.5, 0.58, 0.66, 0.74, 0.82, 0.9, 1.0)
"""Shares of a channel's full range that its grid may span."""

SIDES = ((1.0, 1.0), (0.8, 1.0), (0.6, 1.0), (1.0, 0.8), (1.0, 0.6))
"""How much of such a share below and above zero an asymmetric grid may span."""

MAX_WEIGHTS_PER_CHUNK = 1 << 24
"""Weights rounded at once, to as many grids as these are enough for."""

DAMPING, RIDGE = 0.1, 0.1
"""See `gptq_round` and `target_weights`."""

BLOCK = 64
"""Columns rounded before the remaining ones are corrected; changes speed alone."""


def _damped(matrix: Tensor, share: float) -> Tensor:
    """`matrix` `(g, k, k)` with `share` of its mean diagonal added to the diagonal."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    # An input that is always the same has no say; 1 keeps the matrix invertible where all are so.
    mean = diagonal.mean(dim=1, keepdim=True)
    extra = share * torch.where(mean > 0, mean, 1.0)
    return matrix + torch.diag_embed(extra.expand_as(diagonal))


def _inverse_root(matrix: Tensor, share: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped matrix `(g, k, k)`.

    Raises:
        UserError: where it holds what is not finite, for which no damping is enough.
    """
    if not torch.isfinite(matrix).all():
        raise UserError("rounding: the network's activations are not finite on these images")
    while True:
        lower, broken = torch.linalg.cholesky_ex(_damped(matrix, share))
        if not broken.any():
            inverse = torch.cholesky_inverse(lower)
            upper, broken = torch.linalg.cholesky_ex(inverse, upper=True)
            if not broken.any():
                return upper
        share = max(10 * share, 1e-6)


def target_weights(weight: Tensor, moments: Moments, ridge: float) -> Tensor:
    """The real-valued weights that, on the quantized network's inputs, come closest to the float
    layer's outputs.

    Args:
        weight: of the float layer, `(g, o, k)`.
        moments: centred, where the layer has a bias to take up the means.
        ridge: r of the module's equation, in mean variances of an input, for moments of many
            samples; with few, chance correlations are many and the pull is stronger.

    Returns:
        `(g, o, k)`.
    """
    hessian = _damped(moments.hessian, ridge * (1 + CROWDED * moments.inputs_per_sample))
    pull = (hessian - moments.hessian).diagonal(dim1=1, dim2=2).unsqueeze(1)
    right = weight @ moments.cross + weight * pull
    return torch.linalg.solve(hessian, right, left=False)


def gptq_round(
    target: Tensor,
    hessian: Tensor,
    scale: Tensor,
    least: Tensor | int,
    largest: Tensor | int,
    *,
    damping: float,
) -> Tensor:
    """Round weights to a grid, each making up for those before it.

    Args:
        target: `(g, o, k)`.
        hessian: second moments of the inputs, `(g, k, k)`.
        scale: step sizes, broadcastable to `(g, o)`.
        least, largest: integers of the grid's ends, broadcastable to `(g, o)`.
        damping: added to the diagonal, in mean variances of an input.

    Returns:
        `(g, o, k)`: `scale` times integers.
    """
    return _round(target, *_elimination(hessian, damping), scale, least, largest)


def _elimination(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """In which order inputs are rounded `(g, k)`, and how much each of those to come makes up for
    one: the upper root of the inverse second moments in that order, `(g, k, k)`."""
    # The inputs with most power first, while there are most left to make up for them.
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    rows = order.unsqueeze(2).expand_as(hessian)
    ordered = hessian.gather(1, rows).gather(2, order.unsqueeze(1).expand_as(hessian))
    return order, _inverse_root(ordered, damping)


def _round(
    target: Tensor,
    order: Tensor,
    root: Tensor,
    scale: Tensor,
    least: Tensor | int,
    largest: Tensor | int,
) -> Tensor:
    groups, outputs, inputs = target.shape
    back = order.argsort(dim=1)
    left = target.gather(2, order.unsqueeze(1).expand_as(target)).clone()
    result = torch.empty_like(left)
    scale, least, largest = (
        torch.as_tensor(v, dtype=left.dtype, device=left.device).expand(groups, outputs)
        for v in (scale, least, largest)
    )
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        block, upper = left[:, :, start:end], root[:, start:end, start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            column = block[:, :, j]
            rounded = torch.round(column / scale).clamp_(least, largest) * scale
            result[:, :, start + j] = rounded
            error = (column - rounded) / upper[:, j, j].unsqueeze(1)
            block[:, :, j + 1 :] -= error.unsqueeze(2) * upper[:, j, j + 1 :].unsqueeze(1)
            errors[:, :, j] = error
        left[:, :, end:] -= errors @ root[:, start:end, end:]
    return result.gather(2, back.unsqueeze(1).expand_as(result))


@torch.no_grad()
def best_grid(quantizer: Quantizer, target: Tensor, hessian: Tensor, *, damping: float) -> Tensor:
    """Rounded weights on the grid that lets them come closest, which `quantizer` is set to.

    Tried are the grid it has, and those from the full range down to half of it, where they are
    asymmetric also with less below zero than above and the other way round; what counts is the
    error in the layer's output after making up, not that of the weights.

    Args:
        quantizer: of the weights.
        target, hessian: see `gptq_round`.

    Returns:
        `(g, o, k)`.
    """
    groups, outputs, inputs = target.shape
    single = quantizer.channels == 1
    scales, zeros = _candidates(quantizer, target)
    elimination = _elimination(hessian, damping)
    best = torch.full((groups, outputs), torch.inf, device=target.device)
    result, best_index = torch.empty_like(target), torch.zeros_like(best, dtype=torch.long)
    qmin, qmax = quantizer.bounds
    at_once = max(1, MAX_WEIGHTS_PER_CHUNK // target.numel())
    for start in range(0, len(scales), at_once):
        # Grids of the same weights are rounded side by side, as if they were outputs of their own.
        some = slice(start, start + at_once)
        scale, zero = (v[some].transpose(0, 1).reshape(groups, -1) for v in (scales, zeros))
        repeated = target.repeat(1, scale.shape[1] // outputs, 1)
        rounded = _round(repeated, *elimination, scale, qmin - zero, qmax - zero)
        rounded = rounded.view(groups, -1, outputs, inputs)
        off = rounded - target.unsqueeze(1)
        error = ((off @ hessian.unsqueeze(1)) * off).sum(3)
        if single:
            error = error.sum((0, 2), keepdim=True).expand_as(error)
        least, where = error.min(dim=1)
        better = least < best
        best = torch.where(better, least, best)
        best_index = torch.where(better, start + where, best_index)
        where = where[:, None, :, None].expand(groups, 1, outputs, inputs)
        result = torch.where(better.unsqueeze(2), rounded.gather(1, where).squeeze(1), result)
    scale, zero = (v.gather(0, best_index.unsqueeze(0)).reshape(-1) for v in (scales, zeros))
    quantizer.initialise(scale[:1] if single else scale, zero[:1] if single else zero)
    return result


def _candidates(quantizer: Quantizer, target: Tensor) -> tuple[Tensor, Tensor]:
    """Step sizes and zero points of the grids that are tried for weights `(g, o, k)`: two tensors
    `(grids, g, o)`."""
    groups, outputs, _ = target.shape
    low, high = target.amin(2), target.amax(2)
    if quantizer.narrow and not quantizer.asymmetric:
        high = torch.maximum(high, -low)
    present = quantizer.scale.detach(), quantizer.zero_point.detach()
    if quantizer.channels == 1:
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
        grids = [tuple(v.expand(groups, outputs) for v in present)]
    else:
        grids = [tuple(v.reshape(groups, outputs) for v in present)]
    sides = SIDES if quantizer.asymmetric else SIDES[:1]
    for share in CLIP_RATIOS:
        for below, above in sides:
            ends = low * (share * below), high * (share * above)
            grids.append(grid_between(*ends, quantizer.bits, quantizer.asymmetric))
    scales, zeros = (torch.stack(v) for v in zip(*grids, strict=True))
    return scales, zeros


@torch.no_grad()
def gptq_quantize_layer(
    layer: QuantConv2d | QuantLinear,
    original: nn.Module,
    moments: Moments,
    *,
    damping: float = DAMPING,
    ridge: float = RIDGE,
) -> None:
    """Set weight, its grid and bias of one quantized layer from its float original and the
    moments."""
    weight, bias = original.weight, original.bias
    assert isinstance(weight, Tensor)
    shape = weight.shape
    groups = moments.hessian.shape[0]
    start = weight.detach().float().reshape(groups, shape[0] // groups, -1)
    # A bias corrects any means; without one the weights have to.
    fitted_moments = moments if bias is None else moments.centred()
    target = target_weights(start, fitted_moments, ridge)
    rounded = best_grid(layer.weight_quantizer, target, fitted_moments.hessian, damping=damping)
    layer.weight.copy_(rounded.reshape(shape))
    if bias is not None:
        assert isinstance(bias, Tensor)
        ours = (rounded @ moments.mean.unsqueeze(2)).reshape(-1)
        theirs = (start @ moments.float_mean.unsqueeze(2)).reshape(-1)
        layer.bias.copy_(bias + theirs - ours)


@contextmanager
def without_fine_activations(module: nn.Module) -> Iterator[None]:
    """Disables fake quantization of activations of `FINE` bits and more within the context, so that
    weights compensate only for errors that are alike on all images.

    Rounding errors of fine grids are small and depend on the positions of values between steps:
    compensating for them on synthetic images did harm on photographs that differ from these
    (YOLOv5n for faces at W8A8, ranges of photographs, agreement on kit/coco-val: 0.69, 0.94
    without).
    """
    fine: list[Quantizer | QuantSiLU] = [
        q for _, q in activation_quantizers(module) if q.bits >= FINE and q.enabled
    ]
    fine += [child for child in module.modules() if isinstance(child, QuantSiLU) and child.enabled]
    for quantizer in fine:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in fine:
            quantizer.enabled = True


def is_too_wide(layer: QuantConv2d | QuantLinear) -> bool:
    """Whether a layer's weights are left as they are, to be rounded to the nearest level."""
    return layer.weight[0].numel() > WIDEST


@torch.no_grad()
def gptq_quantize(
    student: Model,
    teacher: Model,
    images: Tensor,
    *,
    damping: float = DAMPING,
    ridge: float = RIDGE,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Round the weights of every quantized layer of `student` that is not too wide, in the order
    they run.

    Args:
        student: quantizers inserted and calibrated, weights still those of the teacher; changed in
            place: its weights lie on their grids afterwards, and its biases are corrected.
        teacher: the float detector it is a copy of, folded.
        images: uint8 `(n, 3, h, w)`, RGB.
        damping, ridge: see `gptq_round` and `target_weights`.
        batch_size: images of one forward pass.
        progress: called with layers done and layers in all.

    Raises:
        UserError: if there is no image.
    """
    if len(images) == 0:
        raise UserError("reconstruction: the set has no images")
    batches = [batch.to(student.device).float() / 255 for batch in images.split(batch_size)]
    order = execution_order(student.module, lambda: student.raw(batches[0][:1]))
    layers = dict(quantized_layers(student.module))
    blocks = student.blocks()
    ended = last_layer_of_block(order, blocks)
    with (
        without_fine_activations(student.module),
        student.shared_proposals(teacher, batches),
        BlockOutputCache.of(student, batches, blocks) as ours,
        BlockOutputCache.of(teacher, batches, blocks) as theirs,
    ):
        for done, (name, calls) in enumerate(order.items()):
            layer, original = layers[name], teacher.module.get_submodule(name)
            if not is_too_wide(layer):
                draw = Generator().manual_seed(done)
                sums = MomentSums(layer, SAMPLES, len(batches) * calls, draw)
                for number in range(len(batches)):
                    x_of_calls = inputs_of(layer, calls, partial(ours.run, number))
                    y_of_calls = inputs_of(original, calls, partial(theirs.run, number))
                    for x, y in zip(x_of_calls, y_of_calls, strict=True):
                        sums.add(x, y)
                gptq_quantize_layer(layer, original, sums.moments(), damping=damping, ridge=ridge)
            if name in ended:
                ours.finish(ended[name])
                theirs.finish(ended[name])
            if progress is not None:
                progress(done + 1, len(order))
