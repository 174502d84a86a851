"""Networks of a layer or two, each of which shows one thing that runtimes are to compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dfq.api.export import describe_export
from dfq.export.exported import ExportInfo
from dfq.export.program import Program, build
from dfq.export.writers import write
from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Boundary, Detections, Detector, DistillationPair, Targets
from dfq.models.nn.decomposed import expose
from dfq.models.nn.matmul import Matmul
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy

SIDE = 16


class Toy(Detector):
    """Anything that takes images, behind the protocol of a detector."""

    family = "toy"
    stride = SIDE // 2
    image_size = SIDE
    fingerprint = "0" * 64
    source = "a toy"

    def __init__(self, module: nn.Module, last: tuple[str, ...] = ()) -> None:
        expose(module)
        self.module = module.eval().requires_grad_(False)
        self.names = ["thing"]
        self._last = last

    def raw(self, images: Tensor) -> Any:
        return self.module(images)

    def levels(self, raw: Any) -> list[Tensor]:
        raise NotImplementedError

    def task_loss(self, raw: Any, targets: Targets, image_shape: tuple[int, int]) -> Any:
        raise NotImplementedError

    def decode(self, raw: Any, image_shape: tuple[int, int], **thresholds: Any) -> list[Detections]:
        raise NotImplementedError

    def distillation_pairs(self, student_raw: Any, teacher_raw: Any) -> Any:
        """All that it gives, by squared distances."""
        outputs = zip(tree_leaves(student_raw), tree_leaves(teacher_raw), strict=True)
        return [DistillationPair("values", ours, theirs, "value") for ours, theirs in outputs]

    def feature_layers(self) -> list[str]:
        return []

    def blocks(self) -> list[str]:
        return []

    def boundary_layers(self) -> Boundary:
        return Boundary((), self._last)

    def spec(self) -> dict[str, Any]:
        return {"family": self.family}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Detector:
        raise NotImplementedError


class Residual(nn.Module):
    """A sum of a layer's output and what that layer is given."""

    def __init__(self, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), act()
        self.conv, self.act2 = nn.Conv2d(8, 8, 3, padding=1), act()
        self.out = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.out(x + self.act2(self.conv(x)))


class Fork(nn.Module):
    """Two branches, concatenated; one of them read by another layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.act, self.act2 = nn.SiLU(), nn.SiLU()
        self.out, self.other = nn.Conv2d(12, 8, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left = self.act(self.left(x))
        joined = torch.cat([left, self.act2(self.right(x))], dim=1)
        return self.out(joined), self.other(left)


class Pooled(nn.Module):
    """Max-pooling, as in SPPF: the tensor and its poolings side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.SiLU()
        self.pool, self.out = nn.MaxPool2d(3, 1, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.out(torch.cat([x, self.pool(x)], dim=1))


class Tokens(nn.Module):
    """Linear layers on rows of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Linear(3, 16), nn.ReLU()
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.stem(x.flatten(2).mT)))


class Attending(nn.Module):
    """Products of activations: queries and keys, the softmax and the values."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, 16) for _ in range(3))
        self.scores, self.mix, self.out = Matmul(), Matmul(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, ::2, ::2].flatten(2).mT
        scores = self.scores(self.query(x) / 4, self.key(x).mT)
        return self.out(self.mix(scores.softmax(-1), self.value(x)))


class Mixed(nn.Module):
    """Linear layers between convolutions, as in networks with a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 16, 3, 2, padding=1), nn.SiLU()
        self.conv, self.gelu = nn.Conv2d(16, 16, 3, padding=1), nn.GELU()
        self.wide, self.back = nn.Linear(16, 32), nn.Linear(32, 16)
        self.out = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.act(self.stem(x)))
        rows = self.back(self.gelu(self.wide(x.flatten(2).mT)))
        return self.out(rows.mT.reshape(x.shape))


def _area() -> nn.Module:
    from ultralytics.nn.modules import C2PSA

    block = C2PSA(64, 64)
    for layer in block.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.fill_(0.5)
    return nn.Sequential(nn.Conv2d(3, 64, 3, 2, padding=1), nn.SiLU(), block, nn.Conv2d(64, 8, 1))


def _between(*layers: nn.Module, channels: int = 8) -> nn.Module:
    """Layers between a convolution and another."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *layers, nn.Conv2d(channels, 8, 1))
    )


def _averaging(layer: nn.Module) -> nn.Module:
    """A layer whose results do not reach as far as what it is given."""
    return _between(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), layer)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "silu": lambda: _between(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()),
    "relu": lambda: _between(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
    "no bias": lambda: _between(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU()),
    "depthwise": lambda: _between(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.SiLU()),
    "grouped": lambda: _between(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.SiLU()),
    "strided": lambda: _between(nn.Conv2d(8, 8, 3, 2, padding=1), nn.SiLU()),
    "dilated": lambda: _between(nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.SiLU()),
    "reflecting": lambda: _between(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
    "deconv": lambda: _between(nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU()),
    "overlapping deconv": lambda: _between(nn.ConvTranspose2d(8, 8, 4, 2, padding=1), nn.ReLU()),
    "upsample": lambda: _between(nn.Upsample(scale_factor=2, mode="nearest")),
    "max-pool": lambda: _between(nn.MaxPool2d(2, 2)),
    "residual": Residual,
    "residual relu": lambda: Residual(nn.ReLU),
    "concat": Fork,
    "pooled": Pooled,
    "linear": Tokens,
    "attention": Attending,
    "mixed": Mixed,
    "c2psa": _area,
    "average": lambda: _averaging(nn.AvgPool2d(2, 1)),
    "adaptive average": lambda: _averaging(nn.AdaptiveAvgPool2d(4)),
    "bilinear": lambda: _averaging(nn.Upsample(scale_factor=2, mode="bilinear")),
}


class Several(nn.Module):
    """Networks of `NETWORKS` side by side on one image, to convert them all at once."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(NETWORKS[name]() for name in names)

    def forward(self, x: Tensor) -> list[Any]:
        return [part(x) for part in self.parts]


def several(names: Sequence[str]) -> Toy:
    """`toy` of several networks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return fold(Toy(Several(names)))  # type: ignore[return-value]


def images(count: int = 2, seed: int = 0) -> Tensor:
    """Smooth images with some noise `(count, 3, SIDE, SIDE)` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")
    return (smooth + 0.1 * torch.rand(count, 3, SIDE, SIDE, generator=generator)).clamp(0, 1)


def toy(name: str, last: tuple[str, ...] = ()) -> Toy:
    """A network of `NETWORKS` with random weights, the same each time, BatchNorm folded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = Toy(NETWORKS[name](), last)
    return fold(made)  # type: ignore[return-value]


def quantized(detector: Detector, runtime: str, widths: tuple[int, int], **more: Any) -> Detector:
    """Its quantized twin with quantizers where a runtime wants them."""
    policy = Policy(*widths, "same", placement="qdq", runtime=runtime, **more)
    student = insert_quantizers(detector.clone(), policy)
    calibrate(student, [images(8, seed=7)], search="minmax")
    return student


FORMATS = {"onnxruntime": "onnx", "openvino": "openvino", "litert": "litert", "tensorrt": "onnx"}
SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "litert": ".tflite", "torch": ".pt2"}


def policy_of(widths: tuple[int, int], runtime: str) -> Policy:
    return Policy(*widths, "same", placement="qdq", runtime=runtime)


def exported(
    detector: Detector,
    runtime: str,
    folder: Path,
    widths: tuple[int, int] | None,
    *,
    format: str | None = None,
    batch: int | None = 1,
    int4: bool = False,
) -> tuple[Program, Path]:
    """The reference program of a detector, and the file that is lowered from it."""
    format = format or FORMATS[runtime]
    size = detector.image_size
    program = build(detector, runtime, image_size=size, dynamic=batch is None, batch=batch or 1)
    policy = None if widths is None else policy_of(widths, runtime)
    info = describe_export(detector, policy, format, runtime, size, batch, None)
    assert isinstance(info, ExportInfo)
    written = write(program, info, folder / f"made{SUFFIX[format]}", int4=int4)
    return program, written[0]


class Pyramid(nn.Module):
    """Three levels, each added to the finer one, a fourth of every second value of the last, and a
    head that all of them share; gives the levels and what the head makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.downs = nn.ModuleList(nn.Conv2d(a, 8, 3, 2, padding=1) for a in (3, 8, 8))
        self.laterals = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.outs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.head, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.up, self.every_second = nn.Upsample(scale_factor=2), nn.MaxPool2d(1, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = []
        for down, lateral in zip(self.downs, self.laterals, strict=True):
            x = self.act(down(x))
            levels.append(lateral(x))
        for finer in (1, 0):
            levels[finer] = levels[finer] + self.up(levels[finer + 1])
        levels = [out(level) for out, level in zip(self.outs, levels, strict=True)]
        levels.append(self.every_second(levels[-1]))
        return [*levels, *(self.last(self.act(self.head(level))) for level in levels)]
