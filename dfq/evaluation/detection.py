"""Detecting in the images of a set, batch by batch, while others are read and decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..data.image_set import ImageSet
from ..data.letterbox import LetterboxTransform, letterboxed_batches
from ..data.outlines import Segment
from ..models.base import Detecting, Detections, Detector, Model, Predicting
from .masks import encode

Progress = Callable[[int, int], object]
"""Called with the number of images done and the number of images there are."""

Row = tuple[Detections, list[Segment]]
"""What is found in an image, in its own pixels, and the masks of the first detections."""


def detect_set(
    detector: Detecting,
    imageset: ImageSet,
    size: int,
    *,
    batch_size: int,
    rect: bool,
    progress: Progress | None,
    **wished: Any,
) -> list[Row]:
    """What a detector finds in every image of a set, in their order.

    Batches are read ahead, and where a detector's `decode_is_pure` one is decoded (NMS takes a
    fifth of a small network's time) while the network works on the next one.

    Args:
        detector: whose mode (train or eval) is restored afterwards.
        imageset: the images.
        size: pixels of the long side.
        batch_size, rect, progress: see `coco.predict`.
        wished: thresholds, and whether masks are wished, as for `detect_batch`.

    Raises:
        UserError: an image cannot be read.
    """
    rows: list[Row] = []

    def add(batch: list[Row]) -> None:
        rows.extend(batch)
        if progress is not None:
            progress(len(rows), len(imageset))

    reading = letterboxed_batches(imageset, size, detector.stride, batch_size, rect=rect)
    with eval_mode(detector), reading as batches:
        if isinstance(detector, Detector) and detector.decode_is_pure:
            _detect_beside(detector, batches, add, **wished)
        else:
            for images, transforms in batches:
                add(detect_batch(detector, images, transforms, **wished))
    return rows


def _detect_beside(
    detector: Detector,
    batches: Iterator[tuple[Tensor, list[LetterboxTransform]]],
    add: Callable[[list[Row]], object],
    **wished: Any,
) -> None:
    """`detect_batch` of each batch, its decoding on a thread of its own."""
    decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")
    decoding: Future[list[Row]] | None = None
    try:
        while True:
            failure, batch = None, None
            try:
                batch = next(batches, None)
                if batch is not None:
                    with torch.no_grad():
                        raw = detector.raw(batch[0].to(detector.device))
            except Exception as error:
                # Told after all that came before it is done.
                failure = error
            if decoding is not None:
                add(decoding.result())
            if failure is not None:
                raise failure
            if batch is None:
                return
            decoding = decoder.submit(_decoded, detector, raw, *batch, **wished)
            del raw
    finally:
        decoder.shutdown(wait=True, cancel_futures=True)


def _decoded(
    detector: Detector,
    raw: Any,
    images: Tensor,
    transforms: Sequence[LetterboxTransform],
    *,
    masks: bool = False,
    **thresholds: Any,
) -> list[Row]:
    # Which threads have each for themselves.
    with torch.no_grad():
        batch = detector.decode(raw, (images.shape[2], images.shape[3]), **thresholds)
        if masks:
            batch = detector.segment(raw, batch)
        return [
            _original(detections, transform)
            for detections, transform in zip(batch, transforms, strict=True)
        ]


def detect_batch(
    detector: Detecting,
    images: Tensor,
    transforms: Sequence[LetterboxTransform],
    *,
    score_threshold: float,
    iou_threshold: float = 0.6,
    masks: bool = False,
) -> list[Row]:
    """Detections in letterboxed images, in pixels of the original ones, on the CPU, and the masks
    of each image's first detections (none where none are wished).

    Args:
        detector: in eval mode.
        images: `(n, 3, h, w)` in [0, 1].
        transforms: how each got there.
        score_threshold, iou_threshold: see `coco.predict`.
        masks: with instance masks, in networks that have them.
    """
    fixed = detector.fixed_batch
    batch: list[Detections] = []
    for part in images.split(fixed or len(images)):
        padded = part
        if fixed is not None and len(part) < fixed:
            # What takes so many images and no fewer is given blank ones at the end.
            padded = torch.cat([part, part.new_zeros(fixed - len(part), *part.shape[1:])])
        # `detect` runs without gradients but not in inference mode: YOLO heads keep tensors (anchor
        # grids) between calls, and inference tensors would break a later backward.
        batch += detector.detect(
            padded.to(detector.device),
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            masks=masks,
        )[: len(part)]
    return [
        _original(detections, transform)
        for detections, transform in zip(batch, transforms, strict=True)
    ]


def _original(detections: Detections, transform: LetterboxTransform) -> Row:
    """Detections on a canvas as boxes and masks on the original image."""
    boxes, segments = detections.boxes.cpu(), []
    if detections.masks is not None:
        whole = transform.undo(boxes[: len(detections.masks)], clip=False)
        segments = encode(detections.masks, whole, *transform.original)
    on_image = Detections(transform.undo(boxes), detections.scores.cpu(), detections.labels.cpu())
    return on_image, segments


@contextlib.contextmanager
def eval_mode(model: Predicting) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode (some may be frozen) afterwards."""
    if not isinstance(model, Model):
        yield
        return
    module = model.module
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
