"""The door of classifiers: models that say of what category a whole image is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..runtime.limits import LARGEST_SIDE
from ..runtime.plain import brief
from .base import DistillationPair, Model, Predicting, Targets
from .detecting import Task

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How a classifier wants its images.

    Attributes:
        image_size: side in pixels of the square it sees.
        mean, std: of the channels R, G, B in [0, 1], which are subtracted and divided by.
        crop: share of the image's shorter side that the square shows, in (0, 1]: images are resized
            so that this side has `image_size / crop` pixels, and their middle is cut out.
        interpolation: of resizing.
    """

    image_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop: float = 1.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        fields = asdict(self)
        return {**fields, "mean": list(self.mean), "std": list(self.std)}

    def changed(self, values: dict[str, Any], source: str) -> Preprocessing:
        """The same with other values, as files have them; keys that are no fields do not count.

        Args:
            values: by field.
            source: of them, for messages.

        Raises:
            UserError: a value is none that is possible; the message names its key.
        """
        checks = {
            "image_size": (_is_side, f"a whole number of pixels up to {LARGEST_SIDE}"),
            "mean": (_are_three, "three numbers, of R, G and B in [0, 1]"),
            "std": (lambda v: _are_three(v) and min(v) > 0, "three numbers above 0"),
            "crop": (lambda v: _is_number(v) and 0 < v <= 1, "a number above 0 and up to 1"),
            "interpolation": (lambda v: v in ("bilinear", "bicubic"), "bilinear or bicubic"),
        }
        known = {**self.to_dict()}
        for key, (good, expected) in checks.items():
            if key not in values:
                continue
            if not good(values[key]):
                raise UserError(
                    f"{source}: {key} is {brief(values[key])}, and should be {expected}"
                )
            known[key] = values[key]
        known["mean"], known["std"] = tuple(known["mean"]), tuple(known["std"])
        return Preprocessing(**known)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_SIDE


def _are_three(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))


class Classifying(Predicting, Protocol):
    """What evaluation and prediction need of a classifier: a `Classifier`, or an exported file."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How it wants its images."""

    def classify(self, images: Tensor) -> Tensor:
        """Logits, float32 `(n, classes)` on the CPU, of images `(n, 3, h, w)` in [0, 1], RGB."""


class Classifier(Model):
    """A model that gives each image one category; `raw` is its logits `(n, classes)`.

    The label of an image is a row of `Targets` whose box is the whole image: sets of such labels
    are like those of detectors.

    Attributes:
        preprocessing: how it wants its images.
    """

    task: Task = "classification"
    preprocessing: Preprocessing

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Logits, float32 `(n, classes)` on the CPU, of images `(n, 3, h, w)` in [0, 1]."""
        logits: Tensor = self.raw(images.to(self.device))
        return logits.float().cpu()

    def normalize(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the spread that the network was trained with."""
        mean = images.new_tensor(self.preprocessing.mean).view(1, 3, 1, 1)
        std = images.new_tensor(self.preprocessing.std).view(1, 3, 1, 1)
        return (images - mean) / std

    def resizing(self, image_size: int) -> str:
        """The shorter side, and what is cut out."""
        short = round(image_size / self.preprocessing.crop)
        interpolation = self.preprocessing.interpolation
        return f"shorter side to {short} ({interpolation}), middle {image_size} cut out"

    def levels(self, raw: Tensor) -> list[Tensor]:
        """The logits."""
        return [raw]

    def task_loss(
        self, raw: Tensor, targets: Targets, image_shape: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Cross entropy "class". Where an image has several labels, as one put together of others
        has, each counts by the area of its box; images without labels do not count."""
        shares = raw.new_zeros(raw.shape, dtype=torch.float32)
        data = targets.data.float()
        image, category = data[:, 0].long(), data[:, 1].long()
        shares.index_put_((image, category), data[:, 4] * data[:, 5], accumulate=True)
        totals = shares.sum(dim=1, keepdim=True)
        labelled = totals[:, 0] > 0
        target_shares = shares / totals.clamp_min(torch.finfo(shares.dtype).tiny)
        losses = -(target_shares * F.log_softmax(raw.float(), dim=1)).sum(dim=1)
        return {"class": losses[labelled].sum() / labelled.sum().clamp_min(1)}

    def distillation_pairs(
        self, student_raw: Tensor, teacher_raw: Tensor
    ) -> list[DistillationPair]:
        """The logits, of one softmax an image."""
        return [DistillationPair("class", student_raw, teacher_raw.detach(), "categorical", dim=1)]

    def outputs(self, raw: Tensor, image_shape: tuple[int, int]) -> dict[str, Tensor]:
        """`logits`."""
        return {"logits": raw}

    @torch.no_grad()
    def label_scores(self, images: Tensor, labels: Sequence[Tensor]) -> list[Tensor]:
        """The probability that the network gives each label `(n_i, 5)` of images `(n, 3, h, w)` in
        [0, 1]: `(n_i,)` an image, on the CPU."""
        probabilities = self.raw(images).float().softmax(dim=1).cpu()
        return [row[label[:, 0].long()] for row, label in zip(probabilities, labels, strict=True)]


def whole_image(categories: Tensor) -> Tensor:
    """Labels `(n, 5)` of categories `(n,)`: boxes that are the whole image."""
    boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(len(categories), 4)
    return torch.cat([categories[:, None].float(), boxes], dim=1)
