"""Measurements of the synthesis loop on one device, one after the other."""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from dfq.kernels import batchnorm as moments
from dfq.models import load_detector
from dfq.models.base import Detector, Model
from dfq.recipe import load_recipe
from dfq.runtime.malloc import freed_memory_kept
from dfq.synthesis.inversion import Inversion
from dfq.synthesis.iteration import Iteration, own_stream, recorder

SIDE_BY_SIDE = (1, 4, 2, 8)
"""Shards that are tried side by side, those first that say most."""

WARM = 24
"""Iterations until both kinds of them are recorded."""


def _why_not(device: torch.device) -> str | None:
    try:
        from dfq.kernels import fused
    except ImportError as error:
        return str(error)
    return fused.why_not(device)


@dataclass(frozen=True)
class Bench:
    """What is measured: networks, device, image sides, images of a shard, iterations of a
    measurement, and images that are synthesized and trained on."""

    models: tuple[str, ...]
    device: str
    sizes: tuple[int, ...]
    batch: int
    iterations: int
    images: int
    train_images: int

    def surroundings(self) -> dict[str, Any]:
        """What ran it."""
        found: dict[str, Any] = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "batch": self.batch,
            "card": None,
        }
        if self.device != "cpu":
            found["card"] = torch.cuda.get_device_name(self.device)
            found["cuda"] = torch.version.cuda
            # The index that a network's tensors have.
            device = torch.zeros(1, device=self.device).device
            found["fused_kernels"] = moments.adds_up(device)
            found["why_not"] = None if found["fused_kernels"] else _why_not(device)
        return found

    def _each(self) -> Iterator[tuple[str, Detector, int]]:
        for model in self.models:
            detector = load_detector(model, device=self.device)
            # The largest first: it says most.
            for size in sorted(self.sizes, reverse=True):
                yield model.rsplit("/", 1)[-1], detector, size

    def _inversion(self, detector: Detector, size: int) -> Inversion:
        return Inversion(detector, load_recipe(None, [f"synthesis.image_size={size}"]).synthesis)

    def _synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def _start(self, inversion: Inversion, size: int, shards: int) -> tuple[Any, ...]:
        generators = [Generator().manual_seed(shard) for shard in range(shards)]
        noise = [inversion.start.noise(self.batch, size, g) for g in generators]
        classes = inversion.detector.num_classes
        labels = [row for g in generators for row in inversion.start_labels(g, self.batch, classes)]
        return torch.cat(noise), labels, generators

    def bare(self) -> Iterator[dict[str, Any]]:
        """Milliseconds of a forward and input-gradient backward pass."""
        for model, detector, size in self._each():
            inversion = self._inversion(detector, size)
            network = inversion.detector
            images = torch.rand(self.batch, 3, size, size, generator=Generator().manual_seed(0))
            images = images.to(self.device, memory_format=torch.channels_last)
            half = inversion.precision == "bfloat16"

            def once(
                network: Model = network, images: Tensor = images, half: bool = half
            ) -> dict[str, Tensor]:
                pixels = images.clone(memory_format=torch.channels_last).requires_grad_()
                with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
                    levels = network.levels(network.raw(pixels))
                ones = [torch.ones_like(level) for level in levels]
                return {"gradient": torch.autograd.grad(levels, pixels, ones)[0]}

            row = {"what": "bare", "model": model, "px": size, "precision": inversion.precision}
            with freed_memory_kept():
                row["eager_ms"] = self._milliseconds(once)
                row["recorded_ms"] = self._recorded(once)
            yield row

    def _milliseconds(self, once: Callable[[], object], warm: int = 5) -> float:
        for _ in range(warm):
            once()
        self._synchronize()
        count, started = max(self.iterations // 3, 1), time.perf_counter()
        for _ in range(count):
            once()
        self._synchronize()
        return round((time.perf_counter() - started) / count * 1e3, 3)

    def _recorded(self, once: Callable[[], dict[str, Tensor]]) -> float | str | None:
        device = torch.device(self.device)
        record = recorder(device)
        if record is None:
            return None
        with own_stream(device):
            once()
            try:
                play, _ = record(once)
            except RuntimeError as error:
                return str(error)[:300]
            return self._milliseconds(play)

    def real(self) -> Iterator[dict[str, Any]]:
        """Milliseconds of an iteration of the product's, and of it for each shard."""
        for model, detector, size in self._each():
            for shards in SIDE_BY_SIDE if self.device != "cpu" else SIDE_BY_SIDE[:1]:
                if shards > 4 and size == max(self.sizes):
                    continue
                try:
                    yield self._loop(model, detector, size, shards, record=True)
                except torch.OutOfMemoryError as error:
                    yield {"what": "real", "model": model, "px": size, "error": str(error)[:200]}
            yield self._loop(model, detector, size, 1, record=False)

    def _loop(
        self, model: str, detector: Detector, size: int, shards: int, *, record: bool
    ) -> dict[str, Any]:
        inversion = self._inversion(detector, size)
        inversion.record = record
        images, labels, generators = self._start(inversion, size, shards)
        marks: dict[int, float] = {}
        last = self.iterations - 1
        warm = min(WARM, last // 2)

        def after(step: int, _images: Tensor) -> None:
            if step in (warm, last):
                self._synchronize()
                marks[step] = time.perf_counter()

        before = 0
        if self.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_reserved()
        started = time.perf_counter()
        with freed_memory_kept():
            inversion.optimise(
                images, labels, self.iterations, 0.05, generators, stage="bench", after=after,
                report=[lambda *_: None] * shards,
            )  # fmt: skip
        each = (marks[last] - marks[warm]) / (last - warm) * 1e3
        row: dict[str, Any] = {
            "what": "real",
            "model": model,
            "px": size,
            "shards": shards,
            "recorded": record and inversion.record and self.device != "cpu",
            "ms": round(each, 3),
            "ms_a_shard": round(each / shards, 3),
            "image_iterations_a_second": round(self.batch * shards / each * 1e3),
            "first_s": round(marks[warm] - started, 2),
        }
        if inversion.not_recorded:
            row["not_recorded"] = inversion.not_recorded
        if self.device != "cpu":
            row["reserved_MB"] = round((torch.cuda.max_memory_reserved() - before) / 1e6)
        return row

    def profile(self) -> Iterator[dict[str, Any]]:
        """Where a plain iteration's time goes, by kernel, microseconds of the device."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU]
        if self.device != "cpu":
            kinds.append(ProfilerActivity.CUDA)
        name = "self_cpu_time_total" if self.device == "cpu" else "self_device_time_total"
        size = max(self.sizes)
        for model in self.models:
            inversion = self._inversion(load_detector(model, device=self.device), size)
            inversion.record = False
            images, labels, generators = self._start(inversion, size, 1)

            def run(steps: int, inversion: Inversion = inversion, given: Any = images) -> None:
                inversion.optimise(given, labels, steps, 0.05, generators, stage="bench")  # noqa: B023

            run(4)
            with profile(activities=kinds) as found:
                run(5)
            rows = sorted(found.key_averages(), key=lambda row: -getattr(row, name))
            total = sum(getattr(row, name) for row in rows)
            yield {
                "what": "profile",
                "model": model.rsplit("/", 1)[-1],
                "px": size,
                "us_of_5": round(total),
                "kernels": [
                    [row.key[:110], row.count, round(getattr(row, name))] for row in rows[:40]
                ],
            }

    def check(self) -> Iterator[dict[str, Any]]:
        """Whether iterations wait for the device, and whether all ways give the same images."""
        size = min(self.sizes)
        for model in self.models:
            detector = load_detector(model, device=self.device)
            for shards in (2,):
                name = model.rsplit("/", 1)[-1]
                row = {"what": "check", "model": name, "px": size, "shards": shards}
                yield row | self._waits(detector, size, shards)
                yield row | self._alike(detector, size, shards)

    def _waits(self, detector: Detector, size: int, shards: int) -> dict[str, Any]:
        inversion = self._inversion(detector, size)
        inversion.record = False
        plain, number = Iteration.__call__, 0

        def watched(self: Iteration, *given: Any) -> Any:
            nonlocal number
            number += 1
            if number > 3 and self.pixels.is_cuda:
                torch.cuda.set_sync_debug_mode("error")
            try:
                return plain(self, *given)
            finally:
                if self.pixels.is_cuda:
                    torch.cuda.set_sync_debug_mode("default")

        Iteration.__call__ = watched  # type: ignore[assignment, method-assign]
        try:
            images, labels, generators = self._start(inversion, size, shards)
            inversion.optimise(images, labels, 22, 0.05, generators, stage="bench")
        except RuntimeError:
            return {"waits": traceback.format_exc()[-1500:]}
        finally:
            Iteration.__call__ = plain  # type: ignore[method-assign]
        return {"waits": "for nothing"}

    def _alike(self, detector: Detector, size: int, shards: int) -> dict[str, Any]:
        """Mean differences of pixels after some iterations from those done with losses of other
        shapes, plainly, one shard at a time."""
        found = {}
        for kind in ("plain", "static", "recorded"):
            inversion = self._inversion(detector, size)
            inversion.record = kind == "recorded"
            inversion.static = inversion.static and kind != "plain"
            images, labels, generators = self._start(inversion, size, shards)
            count = self.batch
            if kind == "plain":
                made = [
                    inversion.optimise(
                        images[i * count : (i + 1) * count],
                        labels[i * count : (i + 1) * count],
                        12,
                        0.002,
                        generator,
                        stage="full",
                    )
                    for i, generator in enumerate(generators)
                ]
                found[kind] = torch.cat(made)
                continue
            found[kind] = inversion.optimise(images, labels, 12, 0.002, generators, stage="full")
            if inversion.not_recorded:
                found[kind] = torch.full_like(found[kind], float("nan"))
                return {"alike": f"not recorded: {inversion.not_recorded}"}
        start = self._start(inversion, size, shards)[0].to(self.device)
        moved = float((found["plain"] - start).abs().mean())
        return {
            "moved": round(moved, 6),
            "static_off": round(float((found["static"] - found["plain"]).abs().mean()), 6),
            "recorded_off": round(float((found["recorded"] - found["static"]).abs().mean()), 6),
        }
