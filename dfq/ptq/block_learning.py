"""One unit while it is reconstructed: its variables, its steps, what is dropped in them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ..graph.execution import hooks
from ..models.base import Model, Targets
from ..quantization.layers import QuantConv2d, QuantLinear
from ..quantization.quantizers import Quantizer
from ..quantization.traversal import quantized_layers
from ..runtime.precision import computing_in, float32
from .adaround import SoftRounding
from .block_cache import BlockOutputCache
from .block_io import BlockBatch, Call, HostCache, watch_calls
from .continuous_weights import ContinuousWeight
from .distribution_correction import corrected
from .objectives import Method, Step
from .units import Unit

ROUND_WEIGHT, WARMUP = 0.01, 0.2
"""Weight of the rounding's regulariser, and share of the iterations before it counts (BRECQ)."""

BETA_START, BETA_END = 20.0, 2.0
"""Exponent of the regulariser, linearly from the end of the warm-up to the last iteration."""

ROUND_TRAVEL, WEIGHT_TRAVEL, SCALE_TRAVEL, BIAS_TRAVEL = 12.0, 2.0, 0.3, 0.05
"""Adam's rates times the iterations: how far rounding variables, weights (in step sizes),
logarithms of step sizes, and biases can go at most, all but the first with a cosine to zero. h goes
from 0 to 1 within 4.8; in the papers' 20,000 iterations rates of 1e-3 and 4e-5 go 20 and 0.8 far.
"""

WEIGHTS_FIRST = 0.5
"""Share of a progressive method's iterations in which activations of the unit stay in float: PFCR
optimizes in two stages; their lengths are ours."""

POOL_EXTRA = 1 << 20
"""How much longer the draw is that masks are taken from than the largest of them."""


@dataclass
class Reconstruction:
    """What all blocks share.

    Attributes:
        student: the quantized network.
        teacher: the float one.
        batches: images `(n, 3, h, w)` in [0, 1].
        method: the objective and how it is used.
        iterations: of each block.
        seed: fixes the order of batches and what is dropped.
        room: bytes of a block's inputs and outputs that are kept on the host.
        targets: gives the labels of a batch; None: there are none.
        precision: that convolutions compute in, as resolved.
        ours, theirs: outputs of the blocks that are done, of student and teacher.
        tail: a copy of the teacher whose blocks up to the present one are the student's.
        fisher: see `fisher_diagonals`; empty where the method does not look at it.
        float_raw: the float network's predictions by batch, as far as they were asked for.
    """

    student: Model
    teacher: Model
    batches: list[Tensor]
    method: Method
    iterations: int
    seed: int
    room: int
    targets: Callable[[int], Targets] | None
    precision: str
    ours: BlockOutputCache
    theirs: BlockOutputCache
    tail: Model
    fisher: dict[str, list[list[Tensor]]]
    float_raw: dict[int, Any] = field(default_factory=dict)

    def float_predictions(self, number: int) -> Any:
        """Those of the float network for a batch."""
        if number not in self.float_raw:
            with torch.no_grad():
                raw = self.theirs.run(number)
            self.float_raw[number] = tree_map_only(Tensor, lambda t: t.detach().clone(), raw)
        return self.float_raw[number]


class Block:
    """One unit while it is reconstructed: mostly a block.

    Args:
        shared: what is the same for all.
        unit: names of the modules; several run one after another, each on the one before.
        calls: of the unit in a pass; 1 where it is of several modules.
        number: of the unit, which its draws depend on.
        from_integers: rounding starts from the integers that the weights are at, instead of from
            the float weights.
    """

    def __init__(
        self,
        shared: Reconstruction,
        unit: Unit,
        calls: int,
        number: int,
        *,
        from_integers: bool = False,
    ) -> None:
        self.shared, self.unit, self.calls, self.number = shared, unit, calls, number
        self.from_integers = from_integers
        self.parts = [shared.student.module.get_submodule(name) for name in unit]
        self.originals = [shared.teacher.module.get_submodule(name) for name in unit]
        self.module, self.original = _chained(self.parts), _chained(self.originals)
        self.layers = {
            name: layer
            for prefix, part in zip(unit, self.parts, strict=True)
            for name, layer in _layers_in(part, prefix)
        }
        count = len(shared.batches)
        self.io = HostCache(self._watch, count, room=shared.room, device=shared.student.device)
        self.draws = Generator(shared.student.device).manual_seed(shared.seed * 1_000_003 + number)
        self.offsets = Generator().manual_seed(shared.seed * 1_000_003 + number)
        self.pool: Tensor | None = None
        self.dropping = True
        self.in_float = False
        self.variances = self._variances()

    def _watch(self, batch: int) -> BlockBatch:
        shared = self.shared
        inputs, _ = watch_calls(
            self.parts[0], self.calls, lambda: shared.ours.run(batch), outputs=False
        )
        float_inputs, outputs = watch_calls(
            self.originals[0],
            self.calls,
            lambda: shared.theirs.run(batch),
            outputs=True,
            last=self.originals[-1],
        )
        if shared.method.correct:
            float_inputs = [corrected(self.original, call) for call in float_inputs]
            outputs = [self.original(*call.args, **call.kwargs) for call in float_inputs]
        return BlockBatch(inputs, float_inputs, outputs)

    def _variances(self) -> list[float]:
        """Variances of the float outputs, over a few batches."""
        variances = [
            [float(t.float().var()) for t in _floating(self.io.get(number).outputs)]
            for number in range(min(4, len(self.shared.batches)))
        ]
        return [max(sum(column) / len(column), 1e-12) for column in zip(*variances, strict=True)]

    def learn(self) -> None:
        """Learn rounding and scales, and leave them in the network."""
        if not self.layers:
            return
        method = self.shared.method
        soft = self._soften()
        scales = self._scales() if method.scales else []
        if method.continuous:
            scales += [variable.quantizer.log_scale for variable in soft.values()]
        biases = [layer.bias for layer in self.layers.values() if layer.bias is not None]
        iterations, batches = self.shared.iterations, len(self.shared.batches)
        travel = WEIGHT_TRAVEL if method.continuous else ROUND_TRAVEL
        groups = [_group([s.variable for s in soft.values()], travel / iterations)]
        if scales:
            groups.append(_group(scales, SCALE_TRAVEL / iterations))
        if method.biases and biases:
            groups.append(_group(biases, BIAS_TRAVEL / iterations))
        learned = [p for group in groups[1:] for p in group["params"]]
        before = [parameter.requires_grad for parameter in learned]
        for parameter in learned:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(groups)
        order: list[int] = []
        cpu = Generator().manual_seed(self.shared.seed * 1_000_003 + self.number)
        with self._dropped(method.drop), torch.enable_grad():
            for step in range(iterations):
                self.in_float = method.progressive and step < WEIGHTS_FIRST * iterations
                if not order:
                    order = torch.randperm(batches, generator=cpu).tolist()
                # Rounding's rate stays, as its regulariser grows.
                for group in optimizer.param_groups[0 if method.continuous else 1 :]:
                    group["lr"] = group["peak"] * _cosine(step / iterations)
                optimizer.zero_grad(set_to_none=True)
                loss = method.objective(self._step(order.pop()))
                beta = _beta(step / iterations)
                terms = [
                    s.regulariser(beta)
                    for s in soft.values()
                    if isinstance(s, SoftRounding) and beta is not None
                ]
                if terms:
                    loss = loss + ROUND_WEIGHT * torch.stack(terms).sum()
                loss.backward()
                optimizer.step()
        for parameter, wanted in zip(learned, before, strict=True):
            parameter.requires_grad_(wanted)
            parameter.grad = None
        for layer, variable in soft.items():
            layer.weight.copy_(variable.rounded())
            layer.weight_quantizer = variable.quantizer

    def _soften(self) -> dict[QuantConv2d | QuantLinear, SoftRounding | ContinuousWeight]:
        """Put what is learned of the weights in the place of their quantizers."""
        method = self.shared.method
        soft: dict[QuantConv2d | QuantLinear, SoftRounding | ContinuousWeight] = {}
        for name, layer in self.layers.items():
            original = self.shared.teacher.module.get_submodule(name)
            quantizer = layer.weight_quantizer
            variable: SoftRounding | ContinuousWeight
            if method.continuous:
                variable = ContinuousWeight(
                    quantizer, layer.weight if self.from_integers else original.weight
                )
            else:
                codes = quantizer.integers(layer.weight) if self.from_integers else None
                variable = SoftRounding(quantizer, original.weight, codes)
                # Not a submodule of it: it goes back when all is learned.
                object.__setattr__(variable, "quantizer", quantizer)
            layer.weight_quantizer = variable.to(layer.weight.device)
            soft[layer] = variable
        return soft

    def _scales(self) -> list[nn.Parameter]:
        """Logarithms of the step sizes of the activations in the block."""
        scales = {
            child.log_scale: None
            for child in self.module.modules()
            if isinstance(child, Quantizer) and child.enabled and child.searched
        }
        # Those of the weights are out of the network while rounding is learned.
        return list(scales)

    @contextlib.contextmanager
    def _dropped(self, share: float) -> Iterator[None]:
        """Activations in the unit are left in float: at random, or all of them for a while."""
        left = share > 0 or self.shared.method.progressive

        def after(_m: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self.in_float and self.dropping:
                return inputs[0]
            return self._mix(output, inputs[0], share)

        with hooks(
            child.register_forward_hook(after)
            for child in self.module.modules()
            if left and isinstance(child, Quantizer) and child.enabled
        ):
            yield

    def _mix(self, quantized: Tensor, plain: Tensor, share: float) -> Tensor:
        if not self.dropping or share <= 0:
            return quantized
        dropped = self._mask(quantized.numel(), share).view(quantized.shape)
        return torch.where(dropped, plain.to(quantized.dtype), quantized)

    def _mask(self, count: int, share: float) -> Tensor:
        """Booleans `(count,)`, true with probability `share`: somewhere in one long draw, as
        drawing takes longer than what is done with it."""
        if self.pool is None or len(self.pool) < count + POOL_EXTRA:
            size, device = count + POOL_EXTRA, self.shared.student.device
            self.pool = torch.rand(size, generator=self.draws, device=device) < share
        start = int(torch.randint(POOL_EXTRA, (1,), generator=self.offsets))
        return self.pool[start : start + count]

    def _step(self, number: int) -> Step:
        shared = self.shared
        batch = self.io.get(number)
        outputs = _floating([self._run(*pair) for pair in _zip(batch)])
        images = shared.batches[number]

        @cache
        def predictions() -> Any:
            self.dropping = False
            try:
                with computing_in(shared.precision, images.device):
                    shared.ours.select(number)
                    return float32(shared.tail.raw(images))
            finally:
                self.dropping = True

        return Step(
            outputs=outputs,
            float_outputs=_floating(batch.outputs),
            unit=self.variances,
            images=len(images),
            model=shared.student,
            predictions=predictions,
            float_predictions=lambda: shared.float_predictions(number),
            layers=lambda: self._layer_outputs(batch),
            fisher=lambda: shared.fisher[self.unit[-1]][number],
            targets=lambda: self._targets(number),
            image_shape=(images.shape[2], images.shape[3]),
        )

    def _run(self, ours: Call, theirs: Call) -> Any:
        """The quantized block on what the quantized part gives it, mixed with the float part's."""
        share = self.shared.method.drop
        mixed = ours
        if share > 0 and self.dropping:
            mixed = Call(*_mixed(ours, theirs, lambda a, b: self._mix(a, b, share)))
        device = self.shared.student.device
        with computing_in(self.shared.precision, device):
            return float32(self.module(*mixed.args, **mixed.kwargs))

    def _layer_outputs(self, batch: BlockBatch) -> list[tuple[Tensor, Tensor]]:
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        watched = [layer.register_forward_hook(_append(ours)) for layer in self.layers.values()]
        watched += [
            self.shared.teacher.module.get_submodule(name).register_forward_hook(_append(theirs))
            for name in self.layers
        ]
        with hooks(watched):
            for call, float_call in _zip(batch):
                self._run(call, float_call)
                with torch.no_grad():
                    self.original(*float_call.args, **float_call.kwargs)
        pairs = zip(ours, theirs, strict=True)
        return [(a.float(), b.float()) for a, b in pairs if a.shape == b.shape]

    def _targets(self, number: int) -> Targets:
        if self.shared.targets is None:
            raise ValueError("this objective looks at labels, and there are none")
        return self.shared.targets(number)


def _chained(modules: Sequence[nn.Module]) -> nn.Module:
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def _group(parameters: Sequence[nn.Parameter], rate: float) -> dict[str, Any]:
    return {"params": list(parameters), "lr": rate, "peak": rate}


def _append(into: list[Tensor]) -> Callable[..., None]:
    def after(_m: nn.Module, _i: object, output: Tensor) -> None:
        into.append(output)

    return after


def _zip(batch: BlockBatch) -> list[tuple[Call, Call]]:
    return list(zip(batch.inputs, batch.float_inputs, strict=True))


def _mixed(ours: Call, theirs: Call, mix: Callable[[Tensor, Tensor], Tensor]) -> tuple[Any, Any]:
    """A call's arguments with each floating tensor mixed from both; others, and those of another
    shape, are ours."""
    flat = iter(tree_leaves((theirs.args, theirs.kwargs)))

    def mixed(value: Any) -> Any:
        counterpart = next(flat)
        same = isinstance(value, Tensor) and value.is_floating_point()
        if same and isinstance(counterpart, Tensor) and value.shape == counterpart.shape:
            return mix(value, counterpart)
        return value

    return tree_map(mixed, (ours.args, ours.kwargs))


def _floating(values: Any) -> list[Tensor]:
    leaves = tree_leaves(values)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _layers_in(module: nn.Module, name: str) -> Iterator[tuple[str, QuantConv2d | QuantLinear]]:
    for inner, layer in quantized_layers(module):
        yield (f"{name}.{inner}" if inner else name), layer


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def _beta(share: float) -> float | None:
    """The regulariser's exponent at a share of the iterations; None: it does not count yet."""
    if share < WARMUP:
        return None
    return BETA_START + (BETA_END - BETA_START) * (share - WARMUP) / (1 - WARMUP)
