"""The BatchNorm-statistics loss: make a batch look, to every BatchNorm, like the training data.

    L_bn = sum_l ||mu_l(x) - mu_l||_2 + ||var_l(x) - var_l||_2

with mu_l, var_l the running statistics stored in layer l and mu_l(x), var_l(x) those of the batch
at its input (DeepInversion, Yin et al. 2020; the first layer also has a weight of its own). A layer
that runs several times in a pass, as those of a head that all levels share, counts each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import UserError
from ...graph.execution import hooks
from ...graph.fold_batchnorm import FoldedBatchNorm
from ...kernels.batchnorm import (
    grouped_moments,
    grouped_moments_backward,
    grouped_sums,
    silu_with_moments,
    silu_with_moments_backward,
)
from ..moment_sums import Pass
from .divergence import Divergence, DivergenceConstants
from .expected import Expected


class _Watch(torch.autograd.Function):
    """x or silu(x), with the moments of x taken on the way.

    With one backward function for both, the statistics' gradient joins the one that comes from the
    network in the pass over x that is made anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, passed: Pass, run: int, silu: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.passed, ctx.run, ctx.silu = passed, run, silu
        known = passed.known
        if silu and passed.alone:
            out = silu_with_moments(x, *passed.addresses(run, "expected", "mean", "var"))
            if out is not None:
                return out, x.new_empty(0)
        if passed.summed:
            out = grouped_sums(x, known.means[run], *passed.sums(run), silu)
        else:
            where = [passed.channels(run, group) for group in range(known.groups)]
            out = grouped_moments(x, known.means[run], where, silu)
        return (out if silu else x.view_as(x)), x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, token: Tensor | None) -> Any:
        (x,) = ctx.saved_tensors
        if token is None:
            through = torch.ops.aten.silu_backward(grad, x) if ctx.silu else grad
            return through, None, None, None
        passed, output_grad = ctx.passed, torch.zeros_like(x) if grad is None else grad
        if ctx.silu and passed.alone:
            places = passed.addresses(ctx.run, "slope", "offset")
            out = silu_with_moments_backward(x, output_grad, *places)
            if out is not None:
                return out, None, None, None
        slope, offset = passed.linear(ctx.run)
        return grouped_moments_backward(x, output_grad, slope, offset, ctx.silu), None, None, None


class _Join(torch.autograd.Function):
    """The moments of `whole` as tensors with a gradient, which goes to the layers of `passed`."""

    @staticmethod
    def forward(ctx: Any, passed: Pass, whole: Pass, *tokens: Tensor) -> tuple[Tensor, Tensor]:
        ctx.passed, ctx.whole = passed, whole
        ctx.token, ctx.count = tokens[0].detach(), len(tokens)
        return whole.mean.clone(), whole.var.clone()

    @staticmethod
    def backward(ctx: Any, mean: Tensor, var: Tensor) -> Any:
        passed = ctx.passed
        passed.set_linear(*ctx.whole.differentiate(mean, var))
        return None, None, *[ctx.token] * ctx.count


def has_statistics(module: nn.Module) -> bool:
    """Whether a network has BatchNorm statistics, of layers folded or not."""
    return bool(_layers(module))


def _layers(module: nn.Module) -> dict[str, _BatchNorm | FoldedBatchNorm]:
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, FoldedBatchNorm)
        or (isinstance(child, _BatchNorm) and child.running_mean is not None)
    }


class BatchNormStatistics:
    """Watches the inputs of every BatchNorm of a frozen network; a context manager.

    A folded BatchNorm counts like any other: the statistics of what went into it follow from those
    of what the folded convolution gives, and a network without BatchNorm layers runs faster.

    Args:
        module: the network, in eval mode.
        run: runs one forward pass of it on any input, to see which layers' values are overwritten
            by what comes after (a residual sum in place, say) and so have to be kept apart, and
            which go into a SiLU, that then takes the statistics in passing; None: none are.

    Raises:
        UserError: if it holds no BatchNorm with running statistics.
    """

    def __init__(self, module: nn.Module, run: Callable[[], object] | None = None) -> None:
        self.layers = _layers(module)
        if not self.layers:
            raise UserError(
                "the model has no BatchNorm statistics to match: it has no BatchNorm layer, or "
                "they were fused away; use an unfused checkpoint, or --set synthesis.weights.bn=0 "
                "--set synthesis.weights.first_bn=0"
            )
        self._module, self._groups = module, 1
        self._indices = {layer: index for index, layer in enumerate(self.layers.values())}
        # By run, its layer: the first one of each, then further ones as they were seen.
        self._runs = list(self.layers)
        self._further: dict[tuple[int, int], int] = {}
        self._silus = [child for child in module.modules() if type(child) is nn.SiLU]
        self._known: dict[tuple[bool, int], Expected] = {}
        if not self._expected(relative=True).to_mean.any():
            raise UserError(
                "the model's BatchNorm layers have running variances of zero: it was saved before "
                "training, or its statistics were lost; name a trained checkpoint, or --set "
                "synthesis.weights.bn=0 --set synthesis.weights.first_bn=0"
            )
        self._pass: Pass | None = None
        # How often each layer ran in the last pass.
        self._times = [0] * len(self._indices)
        # Of the last pass, by run in their order: empty tensors that tie it to the graph.
        # Not in the pass itself: the layers' nodes hold that, and would hold themselves through
        # it, a circle that no garbage collector sees, with every activation in it.
        self._tokens: dict[int, Tensor] = {}
        self._whole: Pass | None = None
        # For the runs, counts and groups of the last pass that was asked of.
        self._constants: tuple[Any, DivergenceConstants] | None = None
        # What a layer gave whose SiLU comes next, and its index.
        self._due: tuple[Tensor, int] | None = None
        self._handles: list[Any] = []
        self._overwritten: frozenset[nn.Module] = frozenset()
        self._fused: frozenset[nn.Module] = frozenset()
        if run is not None:
            self._look(run)

    def _look(self, run: Callable[[], object]) -> None:
        passed: list[tuple[nn.Module, Tensor, int]] = []
        activated: list[Tensor] = []

        def note(layer: nn.Module, _i: object, output: Tensor) -> None:
            passed.append((layer, output, output._version))

        # Of a BatchNorm proper the output is another tensor than the input that is watched.
        folded = [layer for layer in self._indices if isinstance(layer, FoldedBatchNorm)]
        with (
            hooks(layer.register_forward_hook(note) for layer in folded),
            hooks(
                silu.register_forward_pre_hook(lambda _m, inputs: activated.append(inputs[0]))
                for silu in self._silus
            ),
            torch.no_grad(),
        ):
            run()
        # All of them are still alive, so that no two have one id.
        activated_ids = {id(tensor) for tensor in activated}
        stray = {layer for layer, output, _ in passed if id(output) not in activated_ids}
        self._fused = frozenset(layer for layer, _, _ in passed) - stray
        changed = frozenset(layer for layer, output, then in passed if output._version != then)
        self._overwritten = changed - self._fused

    def __enter__(self) -> BatchNormStatistics:
        # What calls the network as a whole begins a pass with that; see `forget`.
        self._handles.append(self._module.register_forward_pre_hook(lambda *_: self.forget()))
        for layer, index in self._indices.items():
            if layer in self._fused:
                # A hook on each would take as long as the SiLU of a small layer.
                layer.forward = functools.partial(self._come_by, index)
            else:
                self._handles.append(layer.register_forward_pre_hook(self._tap))
        for silu in self._silus if self._fused else ():
            # A hook can follow what a module computes, not take its place.
            silu.forward = functools.partial(self._activate, silu.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for silu in self._silus if self._fused else ():
            del silu.forward
        for layer in self._fused:
            del layer.forward
        self._handles.clear()
        self.forget()
        self._whole = None

    @property
    def groups(self) -> int:
        """Into so many of equal size the images of a pass fall, one after the other, and each has
        statistics of its own: what is told of a pass then has a first dimension more, of groups.
        Parts of a batch are put together of one group alone."""
        return self._groups

    @groups.setter
    def groups(self, value: int) -> None:
        self.forget()
        self._groups = value

    def forget(self) -> None:
        """Leave out the last forward pass, whatever was run since one was asked for.

        A detector's pass need not call the network as a whole, so where one ends cannot be seen:
        one that nobody asks of has to be left out before the next.
        """
        self._pass = self._due = None
        self._tokens = {}

    def _come_by(self, index: int, x: Tensor) -> Tensor:
        self._due = x, index
        return x

    def _tap(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = self._watch(inputs[0], self._indices[layer], silu=False)
        return (x.clone() if layer in self._overwritten else x,)

    def _activate(self, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self._due is None or self._due[0] is not x:
            return plain(x)
        (_, index), self._due = self._due, None
        return self._watch(x, index, silu=True)

    def _watch(self, x: Tensor, index: int, silu: bool) -> Tensor:
        if self._pass is None:
            self._pass, self._tokens = Pass(self._expected(relative=False)), {}
            self._times = [0] * len(self._indices)
        passed, run = self._pass, self._run(index, self._pass)
        out, token = _Watch.apply(x, passed, run, silu)
        passed.counts[run] = x.numel() // x.shape[1] // self._groups
        self._tokens[run] = token
        return out

    def _run(self, index: int, passed: Pass) -> int:
        """Index of the run that a layer begins."""
        before = self._times[index]
        self._times[index] += 1
        if before == 0:
            return index
        if (index, before) not in self._further:
            self._further[index, before] = len(self._runs)
            self._runs.append(self._runs[index])
            self._known.clear()
        passed.extend(self._expected(relative=False))
        return self._further[index, before]

    def _expected(self, relative: bool) -> Expected:
        key = relative, self._groups
        if key not in self._known:
            layers = (self.layers[name] for name in self._runs)
            self._known[key] = Expected(layers, relative, self._groups)
        return self._known[key]

    def gather(self) -> None:
        """Count the last forward pass as one more part of a batch.

        From then on `distances` tells of all the parts together, until `release`; its gradient is
        that of the images of the last pass alone, which has to be of one of the parts.
        """
        passed = self._take()
        if self._whole is None:
            self._whole = passed
            return
        for part in (self._whole, passed):
            part.extend(self._expected(relative=False))
        self._whole.add(passed)

    def compared(self) -> list[tuple[str, float, float]]:
        """Of all the parts that were gathered, by run in their order: name of the layer, mean over
        the channels of how many standard deviations the mean is off, and of the logarithm of the
        variance over that of the training data."""
        whole, known = self._whole, self._expected(relative=True)
        if whole is None:
            raise RuntimeError("no forward pass to tell of")
        alive = (known.to_mean > 0).to(whole.mean.dtype)
        stored = known.var.clamp_min(1e-12)
        shift = (whole.mean - known.mean).abs() / stored.sqrt()
        ratio = (whole.var / stored).clamp_min(1e-6).log()
        count = known.sums(alive).clamp_min(1)
        rows = zip(
            (known.sums(shift * alive) / count).tolist(),
            (known.sums(ratio * alive) / count).tolist(),
            strict=True,
        )
        layers = [(name, *row) for name, row in zip(self._runs, rows, strict=True)]
        return [layers[index] for index in self._tokens]

    def release(self) -> None:
        """Forget the parts: `distances` again tells of the last forward pass."""
        self._whole = None

    def _take(self) -> Pass:
        passed, self._pass = self._pass, None
        if passed is None:
            raise RuntimeError("no forward pass to tell of")
        passed.finish()
        return passed

    def first_layer(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the last forward pass, for the living channels of what ran first: mean and
        variance, and those of the training data, `(c,)` each. Each pass can be asked once."""
        mean, var, known, ran = self._moments(relative=True)
        *moments, factor = (
            values.split(known.sizes)[ran[0]]
            for values in (mean, var, known.mean, known.var, known.to_mean)
        )
        mean, var, stored_mean, stored_var = (values[factor > 0] for values in moments)
        return mean, var, stored_mean, stored_var

    def _asked(self, relative: bool) -> tuple[Pass, Pass, Expected, dict[int, Tensor]]:
        """The last pass, the one of which the moments count, what is known of them, and tokens of
        the runs that were made, in their order."""
        passed, known = self._take(), self._expected(relative)
        tokens, self._tokens = self._tokens, {}
        whole = self._whole or passed
        whole.extend(known)
        return passed, whole, known, tokens

    def _moments(self, relative: bool) -> tuple[Tensor, Tensor, Expected, list[int]]:
        """Mean and variance of every channel in the last pass, what is known of them, and which
        runs were made, in their order."""
        passed, whole, known, tokens = self._asked(relative)
        mean, var = _Join.apply(passed, whole, *tokens.values())
        return mean, var, known, list(tokens)

    def divergences(self) -> Tensor:
        """Of the last forward pass: by how much the layers' inputs are not distributed as in
        training, `(runs,)` in the order the layers ran, nats, see `losses.divergence`; a layer that
        ran twice is there twice. Each pass can be asked once.

        Unlike a distance of variances it is not content with too little: half the variance counts
        for as much as 1.75 times it, a tenth as 3.7 times.
        """
        return self._divergence(None, normed=False)

    def divergence(self, weigh: Callable[[int], Tensor]) -> Tensor:
        """The L2 norm over `divergences`, weighed: a scalar. Each pass can be asked once.

        Args:
            weigh: gives factors `(runs,)` in the order the layers ran, for their number; asked
                when that changes.
        """
        return self._divergence(weigh, normed=True)

    def _divergence(self, weigh: Callable[[int], Tensor] | None, *, normed: bool) -> Tensor:
        passed, whole, known, tokens = self._asked(relative=True)
        key = tuple(tokens), tuple(whole.counts), weigh is None, known
        if self._constants is None or self._constants[0] != key:
            weights = None if weigh is None else weigh(len(tokens)).to(known.mean.device)
            constants = DivergenceConstants(known, list(tokens), key[1], weights)
            self._constants = key, constants
        result: Tensor = Divergence.apply(
            passed, whole, self._constants[1], normed, *tokens.values()
        )
        return result

    def distances(self, *, relative: bool = False) -> Tensor:
        """Of the last forward pass: ||mu - mu_l||_2 + ||var - var_l||_2 of each layer, each time it
        ran: `(runs,)` in their order. Each pass can be asked once.

        Args:
            relative: in units of each channel's own standard deviation and variance, root mean
                square over the channels, so that no layer counts for more because its values are
                larger or its channels more.
        """
        mean, var, known, ran = self._moments(relative)
        to_mean = known.norms((mean - known.mean) * known.to_mean)
        to_var = known.norms((var - known.var) * known.to_var)
        return known.of_runs(to_mean + to_var, ran)
