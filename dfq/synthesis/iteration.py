"""One iteration of the optimisation, and its recording on a GPU.

What changes from one iteration to the next comes in through `Inputs`; all else an iteration changes
in place. So it can be recorded once, as a CUDA graph, and played back: the hundreds of kernels of a
small network then wait for each other instead of for the processor to start them.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.base import Targets
from .augmentation import augmented_view, nothing_drawn
from .loss_weighting import LossWeighting
from .multiscale import MultiscaleAdam

Parts = Callable[[Tensor, Targets], Iterator[tuple[dict[str, Tensor], Tensor]]]

Terms = dict[str, Tensor]


@dataclass
class Inputs:
    """Of one iteration.

    Attributes:
        rate: of the optimizer, a number or a scalar on the device.
        flipped, erased: see `Draws.at`.
        targets: labels of the images as they are, not mirrored.
    """

    rate: float | Tensor
    flipped: Tensor | None
    erased: Tensor | None
    targets: Targets


class Iteration:
    """View, losses, gradient and step on images of one or more shards; reads `Inputs` alone.

    Args:
        pixels: float32 `(shards * n, 3, h, w)`, with a gradient.
        optimizer: of them.
        combine: turns terms into a gradient.
        parts: of what the network is shown, see `Inversion._parts`.
        seen_in: type of that.
        darkens: whether the image norm counts.
    """

    def __init__(
        self,
        pixels: Tensor,
        optimizer: MultiscaleAdam,
        combine: LossWeighting,
        parts: Parts,
        seen_in: torch.dtype,
        *,
        darkens: bool,
    ) -> None:
        self.pixels, self.optimizer, self.combine = pixels, optimizer, combine
        self.parts, self.seen_in, self.darkens = parts, seen_in, darkens
        # A constant must not be made while an iteration is recorded.
        nothing_drawn(len(pixels), pixels.device)

    def __call__(self, inputs: Inputs, step: int) -> Terms:
        """Do it; the terms of the loss, for logs.

        Args:
            inputs: of this iteration.
            step: its number, of which counts whether it is one that measures; see `LossWeighting`.
        """
        targets = inputs.targets
        if inputs.flipped is not None:
            targets = targets.flip_horizontal(inputs.flipped)
        view = augmented_view(self.pixels, inputs.flipped, inputs.erased, self.seen_in)
        gradient, terms = self.combine(self.parts(view, targets), step)
        (gradient,) = torch.autograd.grad(view, self.pixels, gradient)
        gradient, terms["tv"] = self.combine.smoothed(gradient, self.pixels)
        if self.darkens:
            gradient, terms["l2"] = self.combine.darkened(gradient, self.pixels)
        self.optimizer.step(gradient, inputs.rate)
        return terms


class Recorded:
    """An `Iteration` that is recorded where that is worth it, and played back.

    Args:
        run: the iteration; of static shapes.
        record: makes a recording of a function, as `Recorder` does.

    Attributes:
        failed: why there is no recording, for people; None where there is, or none was tried yet.
    """

    def __init__(self, run: Callable[[Inputs, int], Terms], record: Recorder) -> None:
        self.run, self.record = run, record
        self.failed: str | None = None
        self._inputs: Inputs | None = None
        self._recordings: dict[Hashable, tuple[Callable[[], None], Terms]] = {}
        self._ran: dict[Hashable, int] = {}

    def forget(self) -> None:
        """What was recorded no longer holds, for other reasons than its inputs."""
        self._recordings.clear()

    def __call__(self, inputs: Inputs, step: int, kind: Hashable) -> Terms:
        """As of the iteration; what it gives is overwritten by the next one.

        Args:
            inputs: of this iteration.
            step: its number.
            kind: of iteration: those of one kind do the same with their inputs.
        """
        buffers = self._take(inputs)
        key = kind, inputs.flipped is None, inputs.erased is None, len(buffers.targets)
        if key not in self._recordings:
            # Once or more as it is, for what is done in the first iterations alone.
            if self.failed is not None or self._ran.get(key, 0) < self.record.warm_up(step):
                self._ran[key] = self._ran.get(key, 0) + 1
                return self.run(buffers, step)
            try:
                self._recordings[key] = self.record(lambda: self.run(buffers, step))
            except RuntimeError as error:
                self.failed = " ".join(str(error).split())[:200] or type(error).__name__
                self._recordings.clear()
                return self.run(buffers, step)
        play, terms = self._recordings[key]
        play()
        return terms

    def _take(self, inputs: Inputs) -> Inputs:
        """Copies in tensors that stay the same from one iteration to the next."""
        buffers = self._inputs
        if buffers is None or len(buffers.targets) != len(inputs.targets):
            device = inputs.targets.data.device
            buffers = Inputs(
                torch.zeros((), device=device) if buffers is None else buffers.rate,
                None if buffers is None else buffers.flipped,
                None if buffers is None else buffers.erased,
                Targets(torch.empty_like(inputs.targets.data)),
            )
            self._inputs = buffers
            self.forget()
        for name in ("flipped", "erased"):
            tensor = getattr(inputs, name)
            if tensor is not None:
                if getattr(buffers, name) is None:
                    setattr(buffers, name, torch.empty_like(tensor))
                getattr(buffers, name).copy_(tensor, non_blocking=True)
        assert isinstance(buffers.rate, Tensor)
        if isinstance(inputs.rate, Tensor):
            buffers.rate.copy_(inputs.rate, non_blocking=True)
        else:
            buffers.rate.fill_(inputs.rate)
        buffers.targets.data.copy_(inputs.targets.data, non_blocking=True)
        return Inputs(
            buffers.rate,
            buffers.flipped if inputs.flipped is not None else None,
            buffers.erased if inputs.erased is not None else None,
            buffers.targets,
        )


class Recorder:
    """Records what a function does on a stream of a GPU of its own, again and again in the same
    memory.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        # After one that failed, PyTorch takes no further one in this process.
        self.broken: str | None = None
        # Keeps the memory that recordings share, whichever of them are still there.
        self._anchor: torch.cuda.CUDAGraph | None = None

    def warm_up(self, step: int) -> int:
        """How often an iteration of a kind is done as it is before it is recorded, if need be at
        iteration `step`."""
        if step == 0:
            return 1
        return WARM_UP if step <= WARM_UP else 0

    def __call__(self, function: Callable[[], Terms]) -> tuple[Callable[[], None], Terms]:
        """What plays the function back, and what it gives then. Called on the stream.

        Raises:
            RuntimeError: where it cannot be recorded.
        """
        if self.broken is not None:
            raise RuntimeError(self.broken)
        try:
            if self._anchor is None:
                held = torch.zeros(1, device=self.stream.device)
                self._anchor, _ = self._record(lambda: {"": held + 1}, None)
            graph, terms = self._record(function, self._anchor.pool())
        except Exception as error:
            # What came first says more than that the recording could not be ended.
            first = error.__context__ or error
            self.broken = " ".join(str(first).split())[:200] or type(first).__name__
            raise RuntimeError(self.broken) from error
        return graph.replay, terms

    def _record(
        self, function: Callable[[], Terms], pool: Any
    ) -> tuple[torch.cuda.CUDAGraph, Terms]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.stream.device)
        # What is collected meanwhile might wait for the device, which is forbidden.
        collects = gc.isenabled()
        gc.disable()
        try:
            # Other threads of this process, which write images, may do as they like meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                terms = function()
            finally:
                graph.capture_end()
        finally:
            if collects:
                gc.enable()
        return graph, terms


WARM_UP = 3
"""Iterations of a stage that are done as they are: libraries choose their kernels then."""


@functools.cache
def recorder(device: torch.device) -> Recorder | None:
    """What records iterations on a device; None where nothing is gained by it."""
    return Recorder(device) if device.type == "cuda" else None


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU the stream on which iterations can be recorded; what is under way elsewhere comes
    before, and what comes after waits for it."""
    graph_recorder = recorder(device)
    if graph_recorder is None:
        yield
        return
    with torch.cuda.device(device):
        before = torch.cuda.current_stream()
        graph_recorder.stream.wait_stream(before)
        try:
            with torch.cuda.stream(graph_recorder.stream):
                yield
        finally:
            before.wait_stream(graph_recorder.stream)
