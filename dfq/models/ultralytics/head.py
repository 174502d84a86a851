"""What Ultralytics' detection head predicts, before and after decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Branch(NamedTuple):
    """What one branch of the head predicts; A is the number of anchor points of all levels.

    Attributes:
        boxes: `(n, 4 * reg_max, A)`: logits of the distances left, top, right, bottom over
            `reg_max` bins each, in units of the level's stride; plain distances for reg_max 1.
        scores: `(n, classes, A)`, logits.
        shapes: height and width of each level's grid, finest first.
    """

    boxes: Tensor
    scores: Tensor
    shapes: tuple[tuple[int, int], ...]

    def grids(self) -> list[Tensor]:
        """Empty stand-ins for the feature maps, of which Ultralytics needs shape and type only;
        float32, for the places of anchor points to be exact."""
        return [self.boxes.new_empty(1, 0, *shape, dtype=torch.float32) for shape in self.shapes]

    def distances(self) -> Tensor:
        """`(n, 4, A)` float32, in strides: the mean over the bins (GFL, eq. 3)."""
        bins = self.boxes.float().unflatten(1, (4, -1))
        if bins.shape[2] == 1:
            return bins.squeeze(2)
        place = torch.arange(bins.shape[2], device=bins.device, dtype=bins.dtype)
        return (bins.softmax(2) * place.view(1, 1, -1, 1)).sum(2)


class RawPredictions(NamedTuple):
    """What `UltralyticsDetector.raw` returns.

    Attributes:
        one2many: the branch trained with several anchor points an object; needs NMS.
        one2one: the NMS-free branch of v10 and 26, None in other networks. Gradients flow from it
            into the backbone (Ultralytics' own training cuts them there), so that images and
            students learn from both branches.
    """

    one2many: Branch
    one2one: Branch | None = None

    def branches(self) -> list[tuple[str, Branch]]:
        """Every branch with the prefix of its name in logs."""
        if self.one2one is None:
            return [("", self.one2many)]
        return [("one2many.", self.one2many), ("one2one.", self.one2one)]


def predict(boxes: Any, scores: Any, features: Sequence[Tensor]) -> Branch:
    """Run the convolutions of one branch, `boxes[level]` and `scores[level]`, on the feature map
    `(n, c, h, w)` of each level."""
    box_maps = [boxes[level](feature) for level, feature in enumerate(features)]
    score_maps = [scores[level](feature) for level, feature in enumerate(features)]
    shapes = tuple((level.shape[2], level.shape[3]) for level in box_maps)
    return Branch(_end_to_end(box_maps), _end_to_end(score_maps), shapes)


def _end_to_end(maps: Sequence[Tensor]) -> Tensor:
    """The places of all levels, `(n, c, A)`. In memory the channels are innermost, as convolutions
    may leave them and as Ultralytics' losses, which look at place after place, want them."""
    return torch.cat([level.flatten(2).mT for level in maps], dim=1).mT


def best_pairs(boxes: Tensor, scores: Tensor, threshold: float, count: int) -> list[Tensor]:
    """The `count` best pairs of anchor point and class per image, as rows
    (x1, y1, x2, y2, score, class): what Ultralytics does with a one2one branch."""
    rows = []
    for image_boxes, image_scores in zip(boxes, scores, strict=True):
        flat = image_scores.T.flatten()
        values, places = flat.topk(min(count, flat.numel()))
        points = places.div(image_scores.shape[0], rounding_mode="floor")
        labels = places % image_scores.shape[0]
        row = torch.cat([image_boxes.T[points], values[:, None], labels[:, None].float()], dim=1)
        rows.append(row[values > threshold])
    return rows
