"""Learnable fake quantization: LSQ (Esser et al., ICLR 2020) and LSQ+ (Bhalgat et al., 2020).

A value x is put on an integer grid and back: with the bounds of the grid taken relative to the
zero point, lo = Q_n - z and hi = Q_p - z,

    q = clamp(round(x / s), lo, hi),        x_hat = s * q.

Both papers' gradients follow from the straight-through estimator for round:

    d x_hat / d x = 1 inside the grid, 0 where it clips
    d x_hat / d s = q - x / s inside, q where it clips
    d x_hat / d z = 0 inside, -s where it clips

Inside is what rounds to a level of the grid, or, as in LSQ's eq. 3, what lies between its ends
before it is rounded: Q_n - z < x / s < Q_p - z. The half step beyond an end makes the difference.

The zero point is learned as a real number and rounded in the forward pass, so that the trained
grid is one an integer runtime has, and real zero (which padding inserts) is always on it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class _FakeQuantize(torch.autograd.Function):
    """The definition above with hand-written gradients.

    PyTorch's learnable fake-quantize kernels compute the same; on CPU they were measured two to
    four times slower than these few vectorised passes (benchmarks/speed/fake_quantize.py).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        strict: bool,
    ) -> Tensor:
        zero = torch.clamp(torch.round(zero_point), qmin, qmax)
        low, high = qmin - zero, qmax - zero
        # In place on fresh tensors: the passes are bound by memory, not by arithmetic.
        steps = x / scale
        y = steps.round()
        y = torch.minimum(torch.maximum(y, low, out=y), high, out=y)
        if any(ctx.needs_input_grad):
            outside = (steps <= low).logical_or_(steps >= high) if strict else None
            error = torch.sub(y, steps, out=steps)
            if outside is not None:
                # Further off than what is inside ever is.
                error.masked_fill_(outside, 1.0)
            y.mul_(scale)
            # Not x: it would be kept alive for this alone, while y is the convolution's input.
            ctx.save_for_backward(error, y, scale)
            return y
        return y.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # error = q - x / s: at most half a step inside the grid, outside it is more. The margin
        # covers single precision, where x / s is off by 2e-5 for levels up to 255.
        error, y, scale = ctx.saved_tensors
        # 0 where it clips: the one kernel that compares and chooses in a single pass.
        grad_x = torch.ops.aten.hardtanh_backward(grad, error, -0.5001, 0.5001)
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            clipped = grad - grad_x
        if ctx.needs_input_grad[1]:
            # d x_hat / d s is the error inside, q = y / s outside.
            grad_scale = _inner(grad_x, error, scale) + _inner(clipped, y, scale) / scale
        if ctx.needs_input_grad[2]:
            grad_zero = clipped.sum_to_size(scale.shape) * -scale
        return grad_x, grad_scale, grad_zero, None, None, None


def _inner(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sum of a * b over the axes that `like` does not have, in its shape."""
    if like.numel() == 1 and a.stride() == b.stride():
        # Dense tensors of one layout, in the order of memory: without writing the product down.
        flat_a, flat_b = _flat(a), _flat(b)
        if flat_a is not None and flat_b is not None:
            return torch.dot(flat_a, flat_b).view(like.shape)
    return (a * b).sum_to_size(like.shape)


def _flat(x: Tensor) -> Tensor | None:
    """All values of a dense tensor in the order of memory; None where it has gaps or overlaps."""
    if x.is_contiguous():
        return x.view(-1)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1)
    return None


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, *, strict: bool = False
) -> Tensor:
    """Fake-quantize `x` with the straight-through gradients of LSQ and LSQ+.

    Args:
        x: floating tensor of any shape.
        scale: positive step size(s), broadcastable to `x`.
        zero_point: real zero point(s) in [qmin, qmax], same shape as `scale`; rounded here.
        qmin, qmax: integer bounds of the grid.
        strict: what is beyond an end of the grid by less than half a step counts as clipped (LSQ's
            eq. 3), and not as rounded; for the gradients alone.

    Returns:
        A tensor like `x` whose every value is `scale` times an integer.
    """
    return _FakeQuantize.apply(x, scale, zero_point, qmin, qmax, strict)


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant: the gradient scale g of LSQ, eq. 5."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float | Tensor) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def grid(bits: int, *, signed: bool) -> tuple[int, int]:
    """Integer bounds of a `bits` wide grid: [-2^(b-1), 2^(b-1)-1] signed, [0, 2^b-1] unsigned."""
    if signed:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


_LOG_SCALE_LIMIT = 80.0
"""Beyond it, exp leaves the normal numbers of single precision."""


class Quantizer(nn.Module):
    """One learnable quantizer: of a tensor as a whole, or of each channel of its first axis.

    The step size is held as its logarithm, so it stays positive in any optimizer and a
    learning rate means a relative step for every layer alike.

    Args:
        bits: bit width, 2 to 16.
        channels: number of scales; 1 is per tensor, more is per channel of axis 0.
        asymmetric: a zero point on an unsigned grid (LSQ+), which training may move; else a signed
            grid (LSQ).
        narrow: at 8 bits a signed grid does without its least integer, -128, which not every
            runtime has for weights.
        unsigned: a symmetric grid of values that are never below zero has all its levels above it,
            0 to 2^b - 1, as LSQ has it. In the state that is a zero point at the least integer,
            which no training moves.

    Attributes:
        strict: see `fake_quantize`.
        searched: whether its step size and zero point are found from values and may be learned;
            False for kinds that do without.
        enabled: False disables fake quantization.
        consumer: name of the one function that reads what it gives (as "silu"), which says how much
            which errors matter: see `ranges`. None: nothing is known of what reads it.
        levels: the frozen integer codes, see `freeze_integers`; None: values are rounded.

    State (all of it in the state dict): `log_scale` `(channels,)`, `zero_point` `(channels,)`,
    `initialised` (bool scalar).
    """

    searched = True

    def __init__(
        self,
        bits: int,
        *,
        channels: int = 1,
        asymmetric: bool = False,
        narrow: bool = False,
        unsigned: bool = False,
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 16:
            raise ValueError(f"bits must be 2 to 16, got {bits}")
        self.bits = bits
        self.channels = channels
        self.asymmetric = asymmetric
        self.narrow = narrow
        self.unsigned = unsigned
        self.enabled = True
        self.strict = False
        self.consumer: str | None = None
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.zero_point = nn.Parameter(torch.zeros(channels), requires_grad=asymmetric)
        self.register_buffer("initialised", torch.tensor(False))
        self.initialised: Tensor
        # Not saved: it follows from the weights.
        self.register_buffer("levels", None, persistent=False)
        self.levels: Tensor | None

    @property
    def bounds(self) -> tuple[int, int]:
        """(qmin, qmax) of the integer grid."""
        low, high = grid(self.bits, signed=not self.asymmetric)
        return (-high, high) if self.narrow and low == -128 else (low, high)

    @torch.no_grad()
    def limits_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest integer counted from the zero point, in a shape that goes with values
        `x` channel by channel: what x_hat is made of step sizes with."""
        qmin, qmax = self.bounds
        zero = self.zero_point.round().clamp(qmin, qmax).view(-1, *([1] * (x.ndim - 1)))
        return qmin - zero, qmax - zero

    @property
    def scale(self) -> Tensor:
        """Step sizes `(channels,)`, always positive and finite."""
        return self.log_scale.clamp(-_LOG_SCALE_LIMIT, _LOG_SCALE_LIMIT).exp()

    def scale_of(self, x: Tensor) -> Tensor:
        """Step sizes without gradients, in a shape that goes with values `x` channel by channel."""
        return self.scale.detach().view(-1, *([1] * (x.ndim - 1)))

    @torch.no_grad()
    def initialise(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Set step sizes and zero points `(channels,)` from a range search; see `ranges`."""
        tiny = torch.finfo(torch.float32).tiny
        self.log_scale.copy_(scale.clamp_min(tiny).log())
        if zero_point is not None:
            self.zero_point.copy_(zero_point)
        self.initialised.fill_(True)

    @torch.no_grad()
    def freeze_integers(self, x: Tensor) -> None:
        """Freezes the integer codes of `x`, of any shape with the channels first; the scale stays
        trainable.

        The gradient of the scale is then that of a gain: d x_hat / d s = q, exactly. Rounding again
        would give q - x / s, which is zero for values on the grid, and would change single integers
        as the step size moves. The zero point then has no effect and gets no gradient."""
        self.levels = self._rounded(x)

    @torch.no_grad()
    def integers(self, x: Tensor) -> Tensor:
        """What `x` is rounded to: whole numbers in its shape, counted from the zero point, which
        the step sizes are multiplied with. Where integers are held, those."""
        return self._rounded(x) if self.levels is None else self.levels

    @torch.no_grad()
    def values(self, integers: Tensor) -> Tensor:
        """The levels that `integers` (see there) stand for, in their shape, channels first."""
        return self.scale_of(integers) * integers

    def _rounded(self, x: Tensor) -> Tensor:
        return torch.round(x.float() / self.scale_of(x)).clamp_(*self.limits_of(x))

    def unfreeze(self) -> None:
        """Round what comes in again."""
        self.levels = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        # Modes that watch a network's functions (see `graph.tracing`) count its own, not these.
        with torch._C.DisableTorchFunction():
            return self._quantize(x)

    def _quantize(self, x: Tensor) -> Tensor:
        qmin, qmax = self.bounds
        # bfloat16 has 8 bits for a value: too few to divide and round to one of 256 levels in.
        if x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()
        # LSQ eq. 5: balance the step size's gradient against that of the values it quantizes.
        count = max(1, x.numel() // self.channels)
        factor: float | Tensor = 1.0 / math.sqrt(count * qmax)
        if self.unsigned:
            factor = torch.rsqrt(count * (qmax - self.zero_point))
        shape = (self.channels, *([1] * (x.ndim - 1))) if self.channels > 1 else (1,)
        scale = _ScaleGradient.apply(self.scale, factor).view(shape)
        if self.levels is not None:
            return scale * self.levels
        zero = self.zero_point
        if self.asymmetric:
            zero = _ScaleGradient.apply(zero, factor)
        zero = zero.view(shape).to(x.dtype)
        return fake_quantize(x, scale.to(x.dtype), zero, qmin, qmax, strict=self.strict)

    def extra_repr(self) -> str:
        kind = "asymmetric" if self.asymmetric else "symmetric"
        where = f"{self.channels} channels" if self.channels > 1 else "per tensor"
        return f"{self.bits} bit, {kind}, {where}"
