"""Non-maximum suppression within a file, by the runtime's own operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..models.base import Detections
from .dependencies import require

IOU, MOST = 0.6, 300
"""Overlap from which the lesser box of a class goes, and boxes that stay of a class."""

OUTPUTS = {
    "boxes": "k x 4: x1 y1 x2 y2 in pixels of the letterboxed image, after NMS",
    "scores": "k: probability of the category",
    "labels": "k: index of the category",
    "images_of": "k: index of the image within the batch",
}
"""What a file gives then; k is the number of detections in the whole batch."""


def append_nms(model: Any, score: float) -> None:
    """Put NMS behind the outputs `boxes` `(n, A, 4)` and `scores` `(n, A, classes)` of a model,
    class by class, and give it the outputs of `OUTPUTS` in their place.

    Args:
        model: `onnx.ModelProto`, changed in place.
        score: detections below it are left out.
    """
    onnx = require("onnx", "ONNX")
    helper, numpy_helper = require("onnx.helper", "ONNX"), require("onnx.numpy_helper", "ONNX")
    graph = model.graph
    # As the graph's outputs their names are what the user sees.
    names = {"boxes": "nms.all_boxes", "scores": "nms.all_scores"}
    for node in graph.node:
        for ends in (node.input, node.output):
            ends[:] = [names.get(name, name) for name in ends]
    constants = {
        "nms.most": np.array([MOST], np.int64),
        "nms.iou": np.array([IOU], np.float32),
        "nms.score": np.array([score], np.float32),
        "nms.image": np.array([0], np.int64),
        "nms.class": np.array([1], np.int64),
        "nms.image_box": np.array([0, 2], np.int64),
        "nms.image_class_box": np.array([0, 1, 2], np.int64),
        "nms.last": np.array([1], np.int64),
    }
    for name, array in constants.items():
        graph.initializer.append(numpy_helper.from_array(array, name))
    make = helper.make_node
    limits = ["nms.most", "nms.iou", "nms.score"]
    by_class = ["nms.by_class", *limits]
    graph.node.extend(
        [
            make("Transpose", ["nms.all_scores"], ["nms.by_class"], perm=[0, 2, 1]),
            make("NonMaxSuppression", ["nms.all_boxes", *by_class], ["nms.kept"]),
            make("Gather", ["nms.kept", "nms.image_box"], ["nms.at_box"], axis=1),
            make("GatherND", ["nms.all_boxes", "nms.at_box"], ["boxes"]),
            make("Gather", ["nms.kept", "nms.image_class_box"], ["nms.at_score"], axis=1),
            make("GatherND", ["nms.by_class", "nms.at_score"], ["scores"]),
            make("Gather", ["nms.kept", "nms.class"], ["nms.labels"], axis=1),
            make("Squeeze", ["nms.labels", "nms.last"], ["labels"]),
            make("Gather", ["nms.kept", "nms.image"], ["nms.images"], axis=1),
            make("Squeeze", ["nms.images", "nms.last"], ["images_of"]),
        ]
    )
    del graph.output[:]
    kinds = onnx.TensorProto
    for name, kind, shape in (
        ("boxes", kinds.FLOAT, ["k", 4]),
        ("scores", kinds.FLOAT, ["k"]),
        ("labels", kinds.INT64, ["k"]),
        ("images_of", kinds.INT64, ["k"]),
    ):
        graph.output.append(helper.make_tensor_value_info(name, kind, shape))


def detections(
    outputs: Mapping[str, np.ndarray], count: int, score: float, most: int
) -> list[Detections]:
    """The detections in the outputs of a file with suppression in it, image by image.

    Args:
        outputs: of the file, by name; shapes as its layout has them.
        count: number of images.
        score: detections below it are left out.
        most: detections kept of an image.
    """
    by_image = []
    for image in range(count):
        rows = np.flatnonzero((outputs["images_of"] == image) & (outputs["scores"] > score))
        rows = rows[np.argsort(-outputs["scores"][rows], kind="stable")][:most]
        boxes, scores, labels = (
            torch.from_numpy(np.ascontiguousarray(outputs[name][rows]))
            for name in ("boxes", "scores", "labels")
        )
        by_image.append(Detections(boxes.float().reshape(-1, 4), scores.float(), labels.long()))
    return by_image
