"""Rounding that makes up for itself: GPTQ with the float network's own outputs as the aim.

Rounded to the nearest level, each weight errs on its own, and errors add up over a layer and over
the network. Here a layer's weights are rounded one input after another, and what the rounding of
one has done to the output is made up for by those that are still to come (Frantar et al., GPTQ,
2022, after Hassibi and Stork's Optimal Brain Surgeon). The layer's aim is what the *float* network
gives, from the inputs the *quantized* one provides (as GPTAQ, Li et al. 2025), so that a layer also
corrects what those before it got wrong:

    W' = argmin E ||W y - W' x||^2 + r ||W' - W||^2,   W' on the grid,

y the float layer's input and x the quantized one's at the same place of the same image. Everything
that is needed of the images are second moments, which a few dozen of them settle: it neither
overfits them as training does, nor takes more than a few passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Generator, Tensor, nn

from ..detectors.base import Detector
from ..errors import UserError
from ..quantization.convert import quantized_layers
from ..quantization.layers import QuantConv2d, QuantLinear
from ..quantization.quantizers import Quantizer
from .finished import FinishedBlocks
from .moments import Moments, MomentSums, execution_order, inputs_of

PLACES = 24_000
"""Output places looked at in each layer: ten for each input of the widest ones."""

CROWDED = 20.0
"""How much stronger the pull towards the float weights is for each input a place has to settle."""

SHARES = (0.5, 0.58, 0.66, 0.74, 0.82, 0.9, 1.0)
"""Shares of a channel's full range that its grid may span."""

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


def aim(weight: Tensor, moments: Moments, ridge: float) -> Tensor:
    """The real-valued weights that, on the quantized network's inputs, come closest to the float
    layer's outputs.

    Args:
        weight: of the float layer, `(g, o, k)`.
        moments: centred, where the layer has a bias to take up the means.
        ridge: r of the module's equation, in mean variances of an input, for moments of many
            places; with few, chance correlations are many and the pull is stronger.

    Returns:
        `(g, o, k)`.
    """
    second = _damped(moments.second, ridge * (1 + CROWDED * moments.crowding))
    pull = (second - moments.second).diagonal(dim1=1, dim2=2).unsqueeze(1)
    right = weight @ moments.cross + weight * pull
    return torch.linalg.solve(second, right, left=False)


def round_compensated(
    target: Tensor, second: Tensor, scale: Tensor, qmin: int, qmax: int, *, damping: float
) -> Tensor:
    """Round weights to a grid, each making up for those before it.

    Args:
        target: `(g, o, k)`.
        second: second moments of the inputs, `(g, k, k)`.
        scale: step sizes, broadcastable to `(g, o)`.
        qmin, qmax: integer bounds.
        damping: added to the diagonal, in mean variances of an input.

    Returns:
        `(g, o, k)`: `scale` times integers.
    """
    return _round(target, *_elimination(second, damping), scale, qmin, qmax)


def _elimination(second: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """In which order inputs are rounded `(g, k)`, and how much each of those to come makes up for
    one: the upper root of the inverse second moments in that order, `(g, k, k)`."""
    # The inputs with most power first, while there are most left to make up for them.
    order = second.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    rows = order.unsqueeze(2).expand_as(second)
    ordered = second.gather(1, rows).gather(2, order.unsqueeze(1).expand_as(second))
    return order, _inverse_root(ordered, damping)


def _round(
    target: Tensor, order: Tensor, root: Tensor, scale: Tensor, qmin: int, qmax: int
) -> Tensor:
    groups, outputs, inputs = target.shape
    back = order.argsort(dim=1)
    left = target.gather(2, order.unsqueeze(1).expand_as(target)).clone()
    result = torch.empty_like(left)
    scale = scale.expand(groups, outputs)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        block, upper = left[:, :, start:end], root[:, start:end, start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            column = block[:, :, j]
            rounded = torch.round(column / scale).clamp_(qmin, qmax) * scale
            result[:, :, start + j] = rounded
            error = (column - rounded) / upper[:, j, j].unsqueeze(1)
            block[:, :, j + 1 :] -= error.unsqueeze(2) * upper[:, j, j + 1 :].unsqueeze(1)
            errors[:, :, j] = error
        left[:, :, end:] -= errors @ root[:, start:end, end:]
    return result.gather(2, back.unsqueeze(1).expand_as(result))


@torch.no_grad()
def best_grid(quantizer: Quantizer, target: Tensor, second: Tensor, *, damping: float) -> Tensor:
    """Rounded weights on the grid that lets them come closest, which `quantizer` is set to.

    Tried are the grid it has, and those from the full range down to half of it; what counts is the
    error in the layer's output after making up, not that of the weights.

    Args:
        quantizer: of the weights.
        target, second: see `round_compensated`.

    Returns:
        `(g, o, k)`.
    """
    qmin, qmax = quantizer.bounds
    groups, outputs, _ = target.shape
    full = torch.maximum(target.amax(2) / qmax, target.amin(2) / qmin)
    present = quantizer.scale.detach()
    single = len(present) == 1
    present = present.reshape(1, 1) if single else present.reshape(groups, outputs)
    full = full.max().reshape(1, 1) if single else full
    order, root = _elimination(second, damping)
    best = torch.full((groups, outputs), torch.inf, device=target.device)
    scale, result = present.clone(), torch.empty_like(target)
    for candidate in (present, *(share * full for share in SHARES)):
        candidate = torch.where(candidate > 0, candidate, present)
        rounded = _round(target, order, root, candidate, qmin, qmax)
        off = rounded - target
        error = ((off @ second) * off).sum(2)
        if single:
            error = error.sum().expand_as(best)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better if not single else better[:1, :1], candidate, scale)
        result = torch.where(better.unsqueeze(2), rounded, result)
    quantizer.initialise(scale.reshape(-1))
    return result


@torch.no_grad()
def reconstruct_layer(
    layer: QuantConv2d | QuantLinear,
    original: nn.Module,
    moments: Moments,
    *,
    damping: float,
    ridge: float,
) -> None:
    """Set weight and bias of one quantized layer from its float original and the moments."""
    weight, bias = original.weight, original.bias
    assert isinstance(weight, Tensor)
    shape = weight.shape
    groups = moments.second.shape[0]
    start = weight.detach().float().reshape(groups, shape[0] // groups, -1)
    # A bias takes up whatever the means are; without one the weights have to.
    seen = moments if bias is None else moments.centred()
    target = aim(start, seen, ridge)
    rounded = best_grid(layer.weight_quantizer, target, seen.second, damping=damping)
    layer.weight.copy_(rounded.reshape(shape))
    if bias is not None:
        assert isinstance(bias, Tensor)
        ours = (rounded @ moments.mean.unsqueeze(2)).reshape(-1)
        theirs = (start @ moments.float_mean.unsqueeze(2)).reshape(-1)
        layer.bias.copy_(bias + theirs - ours)


@torch.no_grad()
def reconstruct(
    student: Detector,
    teacher: Detector,
    images: Tensor,
    *,
    damping: float = 0.1,
    ridge: float = 0.1,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Round the weights of every quantized layer of `student`, in the order they run.

    Args:
        student: quantizers inserted and calibrated, weights still those of the teacher; changed in
            place: its weights lie on their grids afterwards, and its biases are corrected.
        teacher: the float detector it is a twin of, folded.
        images: uint8 `(n, 3, h, w)`, RGB.
        damping, ridge: see `round_compensated` and `aim`.
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
    # The block a layer ends, if it is the last to run of those in it.
    ends = {_block_of(name, blocks): name for name in order}
    with (
        student.following(teacher, batches),
        FinishedBlocks(
            student.module, lambda i: student.raw(batches[i]), len(batches), blocks
        ) as ours,
        FinishedBlocks(
            teacher.module, lambda i: teacher.raw(batches[i]), len(batches), blocks
        ) as theirs,
    ):
        for done, (name, calls) in enumerate(order.items()):
            layer, original = layers[name], teacher.module.get_submodule(name)
            sums = MomentSums(layer, PLACES, len(batches) * calls, Generator().manual_seed(done))
            for number in range(len(batches)):
                x_of_calls = inputs_of(layer, calls, partial(ours.run, number))
                y_of_calls = inputs_of(original, calls, partial(theirs.run, number))
                for x, y in zip(x_of_calls, y_of_calls, strict=True):
                    sums.add(x, y)
            reconstruct_layer(layer, original, sums.moments(), damping=damping, ridge=ridge)
            block = _block_of(name, blocks)
            if block is not None and ends[block] == name:
                ours.finish(block)
                theirs.finish(block)
            if progress is not None:
                progress(done + 1, len(order))


def _block_of(layer: str, blocks: Sequence[str]) -> str | None:
    """The block that holds a layer, by qualified names."""
    return next((block for block in blocks if f"{layer}.".startswith(f"{block}.")), None)
