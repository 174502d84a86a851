"""What several tests take: of `test_coco` and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfq.data.image_set import make_item
from dfq.data.readers import ImageSet
from dfq.models.base import Boundary, Detections, Detector, Targets

NAMES = ["cat", "dog", "bird"]


class FakeDetector(Detector):
    """Returns prepared detections, in the pixels of the canvas, in the order of the images."""

    family = "fake"

    def __init__(self, answers: list[Detections], names: list[str] | None = None) -> None:
        self.module = nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1))
        self.names = names or NAMES
        self.image_size, self.stride = 64, 32
        self.answers = answers
        self.shapes: list[tuple[int, ...]] = []
        self.thresholds: dict[str, Any] = {}

    def raw(self, images: Any) -> Any:
        assert not self.module.training
        assert not torch.is_grad_enabled()
        self.shapes.append(tuple(images.shape))
        return len(images)

    def decode(self, raw: Any, image_shape: tuple[int, int], **thresholds: Any) -> list[Detections]:
        self.thresholds = thresholds
        batch, self.answers = self.answers[:raw], self.answers[raw:]
        return batch

    def levels(self, raw: Any) -> list[Any]:
        raise NotImplementedError

    def task_loss(self, raw: Any, targets: Targets, image_shape: tuple[int, int]) -> dict:
        raise NotImplementedError

    def distillation_pairs(self, student_raw: Any, teacher_raw: Any) -> list:
        raise NotImplementedError

    def feature_layers(self) -> list[str]:
        return []

    def blocks(self) -> list[str]:
        return []

    def boundary_layers(self) -> Boundary:
        return Boundary()

    def spec(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Detector:
        raise NotImplementedError


def found(*rows: tuple[list[float], float, int]) -> Detections:
    rows = tuple(sorted(rows, key=lambda row: -row[1]))
    return Detections(
        torch.tensor([box for box, _, _ in rows]).reshape(-1, 4).float(),
        torch.tensor([confidence for _, confidence, _ in rows]).float(),
        torch.tensor([label for _, _, label in rows]).long(),
    )


def image_set(*images: list[tuple[list[float], int, bool]], names: list[str] = NAMES) -> ImageSet:
    items = [
        make_item(
            Path(f"{index}.png"),
            (200, 100),
            index,
            [box for box, _, _ in image],
            [label for _, label, _ in image],
            [ignore for _, _, ignore in image],
        )[0]
        for index, image in enumerate(images)
    ]
    return ImageSet(Path("set"), list(names), items)
