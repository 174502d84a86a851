"""The doors every family comes through: `Model`, and `Detector` or `classifying.Classifier`.

Nothing outside `dfq.models` knows a family's name. Synthesis, quantization, PTQ and QAT need only
what `Model` declares: predictions and how far they are apart, the task's loss, layers and blocks.
What makes boxes of predictions is declared by `Detector`, what makes categories of whole images by
`Classifier`. A new family is one new adapter.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .detecting import Detecting as Detecting
from .detecting import Part, Task, check_side
from .detecting import Predicting as Predicting
from .structures import Boundary as Boundary
from .structures import Detections as Detections
from .structures import DistillationPair as DistillationPair
from .structures import Kinds as Kinds
from .structures import Targets as Targets


class Model(ABC):
    """A trained network of any family behind one protocol.

    Attributes:
        task: what it is for.
        module: the network itself, in eval mode, parameters frozen unless a trainer thaws them.
        names: category names, by index.
        image_size: side in pixels the network was trained for.
        stride: the largest stride; image sides must be multiples of it.
        fingerprint: sha256 (hex) of the file it came from, or of its weights where there is none.
        source: what the user named, for messages and manifests.
        backbone: qualified name of the module that is the backbone, without neck and heads; None
            where the network has no such part.
        random_weights: whether the weights are random because none were named.
        mask_targets: what the mask term of the task loss, in networks that have one, compares with:
            the ellipse inscribed in a label's box, the mask the network itself predicts for it, or
            nothing (boxes only).
        prefix_tokens: so many tokens that the attention layers give first are no patches' (a class
            token).
        half_images: whether `raw` takes half-precision images too, and gives the same for them as
            for float32 ones where its convolutions compute in half precision anyway.
        half_loss: whether `task_loss` takes half-precision predictions as they are and computes in
            float32 what it reads of them; else they have to be float32.
        static_loss: whether there are `shard_losses`.
    """

    mask_targets: Literal["ellipse", "own", "none"] = "ellipse"
    backbone: str | None = None
    random_weights: bool = False
    prefix_tokens: int = 0
    half_images: ClassVar[bool] = False
    static_loss: ClassVar[bool] = False
    half_loss: ClassVar[bool] = False
    family: ClassVar[str]
    task: Task
    module: nn.Module
    names: list[str]
    image_size: int
    stride: int
    fingerprint: str
    source: str

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Move the network in place; returns self."""
        self.module.to(device)
        return self

    def clone(self) -> Self:
        """An independent copy: same family, same weights, its own module (to become a student)."""
        return copy.deepcopy(self)

    @contextmanager
    def shared_proposals(self, leader: Model, batches: Sequence[Tensor]) -> Iterator[None]:
        """Within this context, the network predicts for these batches at the proposals of `leader`,
        so that features and predictions of the two can be compared place by place. A network
        without proposals does nothing.

        Args:
            leader: another network of the same family.
            batches: images `(n, 3, h, w)` in [0, 1]; recognised by identity when `raw` gets them.
        """
        yield

    def normalize(self, images: Tensor) -> Tensor:
        """Map images `(n, 3, h, w)` in [0, 1], RGB, to what the network expects."""
        return images

    def check_size(self, size: int, key: str = "image size") -> None:
        """Refuse a side in pixels that the network cannot take.

        Args:
            size: the side.
            key: what the user set it by, for the message.

        Raises:
            UserError: where it is no positive multiple of the stride; names the nearest that are.
        """
        check_side(size, self.stride, key)

    def check_sides(self, images: Tensor) -> None:
        """Raise a `ValueError` where a side of images `(n, 3, h, w)` is no multiple of `stride`."""
        height, width = images.shape[2:]
        if height % self.stride or width % self.stride:
            raise ValueError(f"image sides {height} x {width} are no multiples of {self.stride}")

    @abstractmethod
    def raw(self, images: Tensor) -> Any:
        """Predictions in the family's own structure for images `(n, 3, h, w)` in [0, 1].

        Differentiable with respect to the images. Includes `normalize`.
        """

    @abstractmethod
    def levels(self, raw: Any) -> list[Tensor]:
        """The raw outputs as one tensor `(n, channels, ...)` a pyramid level (the paper's KL)."""

    @abstractmethod
    def task_loss(
        self, raw: Any, targets: Targets, image_shape: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The family's own training loss on `raw` predictions.

        Args:
            raw: what `raw` returned for a batch.
            targets: labels of that batch.
            image_shape: height and width of the batch, pixels.

        Returns:
            Named scalar terms, each a mean over the batch (not multiplied by the batch size), with
            the family's own gains applied; their sum is the loss.
        """

    def shard_losses(
        self, raw: Any, targets: Targets, image_shape: tuple[int, int], shards: int
    ) -> Tensor:
        """The sum of the terms of `task_loss` for each of several batches of one size, where no
        shape depends on values and nothing waits for the device.

        Args:
            raw: what `raw` returned for all of them, one after the other; every tensor in it is by
                image.
            targets: as many rows for each batch, those of a batch after those of the one before.
                Where the image is negative, a row stands for nothing, and for image `-1 - image`
                where one has to be named.
            image_shape: height and width of the batches, pixels.
            shards: how many batches.

        Returns:
            Float32 `(shards,)`.
        """
        raise NotImplementedError(f"{self.family} has no loss of static shapes")

    @abstractmethod
    def distillation_pairs(self, student_raw: Any, teacher_raw: Any) -> list[DistillationPair]:
        """The outputs that the KL divergence is taken over, by kind of distribution; see
        `DistillationPair`.

        Args:
            student_raw, teacher_raw: what `raw` returned, both for the same batch.
        """

    def prediction_kinds(self) -> dict[str, Kinds]:
        """By name, the layers whose output channels hold predictions of several kinds (classes,
        boxes) that need grids of their own, and which channels hold which."""
        return {}

    @abstractmethod
    def feature_layers(self) -> list[str]:
        """Qualified names of the modules whose outputs feature distillation aligns.

        Each gives one tensor `(n, c, h, w)` or `(n, tokens, c)`.
        """

    def attention_layers(self) -> list[str]:
        """Qualified names of the modules that attend between patches and give their outputs as
        `(windows, tokens, channels)`; synthesis spreads out their similarities. None by default."""
        return []

    @abstractmethod
    def blocks(self) -> list[str]:
        """Qualified names of the blocks that reconstruction walks, in execution order."""

    @abstractmethod
    def boundary_layers(self) -> Boundary:
        """First and last conv/linear layers, kept in float or 8 bit by policy."""

    def resizing(self, image_size: int) -> str:
        """How images get to a side in pixels, in words."""
        return f"longer side to {image_size}, centred on grey 114/255"

    @property
    def has_masks(self) -> bool:
        """Whether the network predicts instance masks."""
        return False

    def exportable(self, images: Tensor) -> Any:
        """What `raw` gives, but for what depends on the values of other predictions: that is left
        to `from_outputs`, which takes what it needs from the `parts`. Traceable by `torch.export`.
        """
        return self.raw(images)

    def parts(self, image_size: int) -> dict[str, Part]:
        """What is exported besides, by name: modules that `from_outputs` runs, under these names of
        `runners`. None where one file tells all."""
        return {}

    def outputs(self, raw: Any, image_shape: tuple[int, int]) -> dict[str, Tensor]:
        """What an exported file gives for `raw`, by name: boxes and scores where a family decodes
        without choosing, else the raw predictions one by one. Traceable by `torch.export`.

        Args:
            raw: what `raw` returned for a batch.
            image_shape: height and width of the batch, pixels.
        """
        leaves = [leaf for leaf in tree_leaves(raw) if isinstance(leaf, Tensor)]
        return {f"raw{index}": leaf for index, leaf in enumerate(leaves)}

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """A JSON-serialisable description from which `dfq.models.from_spec` rebuilds the
        architecture (random weights) without the original checkpoint. Holds at least `family`,
        `names`, `image_size`, `stride`, `fingerprint`, `source`."""

    def stated(self) -> dict[str, Any]:
        """What every `spec` holds beside the family, and `metadata.stated` reads."""
        return {
            "names": list(self.names),
            "image_size": self.image_size,
            "stride": self.stride,
            "fingerprint": self.fingerprint,
            "source": self.source,
        }

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: dict[str, Any]) -> Model:
        """Rebuild what `spec` describes, with random weights, unfused, in eval mode."""


AnyModel = TypeVar("AnyModel", bound=Model)
"""Of functions that give back the kind of model that they are given."""


class Detector(Model):
    """A model that finds objects: its predictions become boxes, categories and scores.

    Attributes:
        decode_is_pure: whether `decode` and `segment` run no part of the network and read nothing
            that `raw` changes, so that one batch may be decoded while another is predicted for.
    """

    task: Task = "detection"
    decode_is_pure: bool = False

    @property
    def fixed_batch(self) -> int | None:
        """Images that a call takes, no more and no fewer; None, as here: any number."""
        return None

    @abstractmethod
    def decode(
        self,
        raw: Any,
        image_shape: tuple[int, int],
        *,
        score_threshold: float = 0.001,
        iou_threshold: float = 0.6,
        max_detections: int = 300,
    ) -> list[Detections]:
        """Raw predictions to detections, by the framework's own decoder and NMS.

        Args:
            raw: what `raw` returned for a batch.
            image_shape: height and width of the batch, pixels.
            score_threshold: least score that is kept, in [0, 1].
            iou_threshold: of NMS, in [0, 1].
            max_detections: kept of an image.

        Returns:
            One `Detections` an image, boxes in pixels of the batch.
        """

    @property
    def runners(self) -> dict[str, Callable[[Tensor], tuple[Tensor, ...]]]:
        """Functions that replace the detector's own `parts`, by name: exported files. They take and
        give tensors of the shapes that the part has."""
        return self.__dict__.setdefault("_runners", {})

    def from_outputs(
        self, outputs: dict[str, Tensor], image_shape: tuple[int, int], **thresholds: Any
    ) -> list[Detections]:
        """Detections from the outputs of an exported file.

        Args:
            outputs: with the names and shapes that `outputs` gives.
            image_shape: height and width of the batch, pixels.
            thresholds: see `decode`.
        """
        batch = len(next(iter(outputs.values())))
        with torch.no_grad():
            # For its structure; what it holds is replaced.
            leaves, structure = tree_flatten(self.raw(torch.zeros(batch, 3, *image_shape)))
        tensors = iter(outputs.values())
        filled = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return self.decode(tree_unflatten(filled, structure), image_shape, **thresholds)

    def segment(self, raw: Any, detections: Sequence[Detections]) -> list[Detections]:
        """`detections`, what `decode` made of `raw`, with masks `(k, m, m)` in [0, 1] where the
        network predicts them; see `Detections`."""
        return list(detections)

    def detect(self, images: Tensor, *, masks: bool = False, **thresholds: Any) -> list[Detections]:
        """Detections for images `(n, 3, h, w)` in [0, 1], one per image; see `decode`.

        Args:
            images: RGB.
            masks: with instance masks, in networks that have them (see `segment`).
            thresholds: of `decode`.
        """
        with torch.no_grad():
            raw = self.raw(images)
            detections = self.decode(raw, (images.shape[2], images.shape[3]), **thresholds)
            return self.segment(raw, detections) if masks else detections
