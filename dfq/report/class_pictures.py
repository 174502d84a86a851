"""Images with what classifiers say of them, as the page shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from ..data.class_set import ClassSet
from ..data.cropped_images import CroppedImages
from ..data.pixels import LabelledImages
from ..evaluation.classification import logits_of
from ..models.classifying import Classifying
from .formats import text
from .pictures import PAIRS, TILES, Pair, Tile, tile

_LONGEST = 40
"""Letters of a category's name."""


def class_tiles(data: LabelledImages, names: Sequence[str], count: int = TILES) -> list[Tile]:
    """The first images of a set, and the categories that they are labelled with.

    Args:
        data: the set.
        names: of the network's categories, which the labels are of.
    """
    indices = list(range(min(count, len(data))))
    labels = data.targets(indices).per_image(len(indices))
    said = [names[int(rows[0, 0])] if len(rows) else "no label" for rows in labels]
    return [
        _tile(image, text(name, _LONGEST))
        for image, name in zip(data.load(indices), said, strict=True)
    ]


def class_pairs_on_squares(
    before: Classifying, after: Classifying, data: LabelledImages, indices: Sequence[int]
) -> list[Pair]:
    """What two networks say of some images of a set.

    Args:
        before, after: the float network and the low-bit one.
        data: the set.
        indices: which images may be shown.
    """
    return _pairs(before, after, data.load(list(indices)[:PAIRS]))


def class_pairs_on_photos(
    before: Classifying, after: Classifying, photos: ClassSet, image_size: int | None
) -> list[Pair]:
    """The same of photos, as the networks see them; `image_size`: side in pixels, None: their
    own."""
    cut = CroppedImages(photos, after, image_size)
    return _pairs(before, after, cut.load(range(min(PAIRS, len(cut)))))


def _pairs(before: Classifying, after: Classifying, pixels: Tensor) -> list[Pair]:
    said = [_likeliest(model, pixels) for model in (before, after)]
    return [
        Pair(_tile(image, before_words), _tile(image, after_words))
        for image, before_words, after_words in zip(pixels, *said, strict=True)
    ]


def _likeliest(model: Classifying, pixels: Tensor) -> list[str]:
    """The likeliest category of each image, and its probability."""
    sure, labels = logits_of(model, pixels).softmax(dim=1).max(dim=1)
    return [
        f"{text(model.names[label], _LONGEST)} {probability:.2f}"
        for label, probability in zip(labels.tolist(), sure.tolist(), strict=True)
    ]


def _tile(image: Tensor, words: str) -> Tile:
    pixels = image.permute(1, 2, 0).numpy()
    bare = tile(pixels, np.zeros((0, 4)), [], [], [], with_scores=False)
    return replace(bare, words=words, caption=words)
