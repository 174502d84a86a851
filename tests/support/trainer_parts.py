"""What several tests take: of `test_trainer` and others."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Detector, Targets
from dfq.qat.settings import Distillation
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from support.tiny_detector import blobs, tiny_detector

POLICY = Policy(weight_bits=3, activation_bits=6)


class Blobs:
    """A calibration set of smooth images with one box each."""

    def __init__(self, count: int = 18) -> None:
        self.images = (blobs(count, seed=7) * 255).round().to(torch.uint8)
        generator = torch.Generator().manual_seed(8)
        self.boxes = 0.3 + 0.3 * torch.rand(count, 4, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: list[int]) -> Tensor:
        return self.images[indices]

    def targets(self, indices: list[int]) -> Targets:
        rows = [torch.cat([torch.zeros(1, 1), self.boxes[i][None]], dim=1) for i in indices]
        return Targets.from_per_image(rows)


@pytest.fixture(scope="module")
def teacher() -> Detector:
    return fold(tiny_detector())


def settings(**changes: Any) -> Distillation:
    """Batches of 7 of 18 images: the last of an epoch is smaller."""
    chosen: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 7,
        "lr": 2e-3,
        "weight_lr": None,
        "scale_lr": 5e-3,
        "ema": 0.5,
        "zoom": 0.2,
        # On every processor the same.
        "precision": "float32",
        "checkpoint_minutes": 0,
        **changes,
    }
    return Distillation(**chosen)


@functools.cache
def calibrated_student() -> Detector:
    """Never trained itself: only its twins are."""
    student = insert_quantizers(fold(tiny_detector()), POLICY)
    calibrate(student, (Blobs().images.float() / 255).split(8), samples=1024)
    return student


def student_of(teacher: Detector, *, calibrated: bool = True) -> Detector:
    if calibrated:
        return calibrated_student().clone()
    return insert_quantizers(teacher.clone(), POLICY)


def state(detector: Detector) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in detector.module.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


class Interrupt(Exception):
    """Stands for a killed process."""
